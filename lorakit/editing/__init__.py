"""One picture, changed: what is not meant to change stays."""
