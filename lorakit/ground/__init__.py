"""What every room stands on: errors and exit codes, configs, files that appear whole, run folders, processes.

Imports nothing else of ours. Of its modules only chunks knows torch.
"""
