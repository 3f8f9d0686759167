"""Every fault that this toolkit promises to survive or to explain, and the tests that prove it.

Families: L the life of a run, D data sets, I pictures, F LoRA files and bases, C configs, B bases as they are
published, P drags, K caches. `code` is the exit code that a script ends with; a test is named by its file
below tests/ and its function, `::` between them.
"""

from typing import NamedTuple

FAMILIES = {
    "L": "life of a run",
    "D": "data sets",
    "I": "pictures",
    "F": "LoRA files and bases",
    "C": "configs",
    "B": "bases as published",
    "P": "drags",
    "K": "caches of a training",
}


class Row(NamedTuple):
    """One fault. `without` says what of it does not apply here, and why."""

    id: str
    fault: str
    code: str
    tests: tuple[str, ...]
    without: str = ""


USER = "test_user_errors.py::test_"
RUN, DATA = "faults/test_run.py::test_", "faults/test_dataset.py::test_"
PICTURES, FILES = "faults/test_pictures.py::test_", "faults/test_lora_and_model_files.py::test_"
CONFIGS, FOLDER, IMAGES = "faults/test_configs.py::test_", "test_folder.py::test_", "test_images.py::test_"
TRAIN, MORPH, RUNS = "test_train.py::test_", "test_morph.py::test_", "test_runs.py::test_"
BASES, SINGLE, HUB = "faults/test_bases.py::test_", "test_single_file.py::test_", "test_hub.py::test_"
LAYOUTS, CHANGED = "test_layouts.py::test_", "test_changed_base.py::test_"
CACHES, SHARDS = "faults/test_caches.py::test_", "test_shards.py::test_"
IMAGIC = "test_edit_imagic.py::test_"
LORA_FILE, MIX = "test_lora_file.py::test_", "test_mix_lora.py::test_"
DRAGS, DRAG = "faults/test_drags.py::test_", "test_drag.py::test_"

ROWS = (
    Row(
        "L1",
        "killed at any moment, in the middle of a save too",
        "0 after the same command",
        (
            f"{TRAIN}kill_9_at_twenty_random_moments_and_resume_equals_a_straight_run",
            "test_every_objective.py::test_kill_9_at_ten_random_moments_and_resume_equals_a_straight_run",
            f"{MORPH}kill_9_at_random_moments_and_the_same_command_gives_the_same_bytes",
            f"{MORPH}kill_9_before_every_kind_of_rename_leaves_nothing_half_done",
            f"{IMAGIC}kill_9_before_every_kind_of_rename_and_the_same_command_gives_the_same_bytes",
            f"{RUNS}a_run_that_always_saves_is_killed_25_times_and_its_newest_checkpoint_is_always_good",
            f"{RUNS}a_kill_at_any_third_line_of_a_save_costs_nothing",
            f"{RUN}l1_the_soak_sees_what_is_not_whole",
        ),
    ),
    Row(
        "L2",
        "stopped after any step and resumed, whatever batch, accumulation, crops and dropout",
        "0",
        (
            f"{TRAIN}a_run_stopped_at_any_step_and_resumed_equals_a_straight_run",
            "test_order.py::test_one_bucket_shows_every_picture_equally_often",
            "test_data.py::test_a_sample_does_not_depend_on_its_batch",
        ),
        "loader workers: a step reads cached tensors and starts none; which sample and noise a step has "
        "follows from seed and position alone, so there is no sampler to restore",
    ),
    Row(
        "L3",
        "one of two training processes dies, or gets a signal",
        "143, or that of the failure",
        (
            f"{RUN}l3_a_rank_that_dies_ends_the_others_and_both_resume_to_the_same_bytes",
            f"{RUN}l3_a_signal_to_one_rank_stops_both_at_the_same_step",
            f"{TRAIN}two_processes_equal_one_with_twice_the_batch",
        ),
    ),
    Row(
        "L4",
        "the disk fills, is read-only or too small, or a file is larger than allowed",
        "4",
        (
            f"{USER}a_full_disk_at_any_write_costs_nothing_and_the_run_resumes_to_the_same_bytes",
            f"{USER}a_disk_that_fills_up_while_training",
            f"{USER}a_disk_that_is_too_full_is_said_before_training",
            f"{USER}a_limit_on_file_sizes_while_training",
            f"{MORPH}a_disk_that_fills_up_at_any_write_keeps_what_is_finished",
            f"{RUNS}a_fault_at_any_call_of_a_save_costs_nothing",
            f"{RUN}l4_a_disk_that_fills_at_any_write_of_a_mix_keeps_the_earlier_lora",
            f"{RUN}l4_a_disk_that_fills_at_any_write_of_an_inversion",
        ),
    ),
    Row(
        "L5",
        "SIGTERM, SIGINT once and twice; while caching, in a step, a validation, a save; to a launcher",
        "143, 130",
        (
            f"{RUN}l5_sigterm_in_a_training_leaves_one_checkpoint_at_its_step",
            f"{RUN}l5_sigterm_while_the_lora_is_published_comes_too_late_to_stop_anything",
            f"{RUN}l5_a_second_interrupt_leaves_at_once_and_costs_no_checkpoint",
            f"{RUN}l5_sigterm_in_a_morph_keeps_what_is_done",
            f"{RUN}l5_a_signal_to_the_morph_alone_ends_the_training_that_it_started",
            f"{RUN}l5_a_training_that_a_signal_ended_before_its_handlers_stood_is_stopped_not_failed",
            f"{RUN}l5_sigterm_to_torchrun_stops_both_ranks_and_leaves_no_orphan",
            f"{TRAIN}a_signal_stops_after_the_step_and_the_printed_command_resumes",
            f"{TRAIN}a_launcher_that_dies_takes_the_training_with_it",
            f"{MORPH}a_signal_stops_after_the_step_and_the_printed_command_goes_on",
            f"{IMAGIC}a_signal_keeps_the_step_and_the_same_command_goes_on",
            "test_process.py::test_a_launcher_that_repeats_the_interrupt_does_not_cut_the_save_short",
        ),
    ),
    Row(
        "L6",
        "two runs in one folder; a lock whose owner was killed",
        "2",
        (
            f"{RUN}l6_a_folder_in_use_is_refused_at_once",
            f"{TRAIN}two_runs_on_one_folder",
            f"{MORPH}two_runs_on_one_folder",
            f"{RUNS}a_second_run_is_refused_by_name_and_a_killed_owner_never_blocks",
        ),
    ),
    Row(
        "L7",
        "a folder that holds an earlier run, or a LoRA of the same name",
        "2",
        (
            f"{USER}a_resume_that_cannot_be_leaves_the_run_as_it_is",
            f"{USER}a_lora_file_of_another_origin_is_not_replaced_unasked",
            f"{MORPH}another_film_in_the_same_folder_is_refused_and_overwrite_replaces_it",
            f"{MIX}nothing_is_overwritten_unless_asked_and_faults_are_one_message",
            f"{RUNS}a_folder_with_a_run_is_refused_unless_resumed_or_overwritten",
        ),
    ),
    Row(
        "L8",
        "resumed with another config or other data",
        "2, or 0 with a line that says what changed",
        (
            f"{RUN}l8_every_key_that_changed_is_refused_or_applied_and_said_or_free",
            f"{TRAIN}every_key_is_classified_for_resume",
            f"{TRAIN}a_change_that_makes_another_run_is_refused_at_resume",
            f"{TRAIN}a_new_learning_rate_is_applied_at_resume_and_said",
            f"{TRAIN}changed_captions_are_refused_at_resume",
        ),
    ),
    Row(
        "L9",
        "the newest checkpoint is cut, zeroed, empty, changed, without manifest, or has a stranger in it",
        "0 from the one before; 2 if none is left",
        (
            f"{RUN}l9_a_damaged_newest_checkpoint_is_passed_over_and_stays_where_it_is",
            f"{RUNS}a_damaged_newest_checkpoint_is_skipped_with_its_reason",
            f"{RUNS}other_names_are_no_checkpoints",
            f"{USER}a_damaged_checkpoint_is_passed_over_with_its_reason",
            f"{USER}when_every_checkpoint_is_damaged_nothing_is_lost_and_each_has_its_reason",
        ),
    ),
    Row(
        "L10",
        "a checkpoint of another version",
        "2",
        (
            f"{RUN}l10_another_version_is_refused_with_both_numbers",
            f"{RUN}l10_a_checkpoint_of_version_1_is_read",
        ),
        "a migration: there has been one version so far, of which the tests hold a checkpoint",
    ),
    Row(
        "L11",
        "an output folder that is a file, lies in one, cannot be written or named; names of any characters",
        "4; 0 for odd names",
        (
            f"{RUN}l11_a_place_that_cannot_be_written_is_found_before_a_model_is_loaded",
            f"{RUN}l11_a_place_that_cannot_be_written_by_a_mix",
            f"{USER}a_setting_that_is_wrong",
            f"{USER}a_read_only_disk",
            f"{USER}a_path_with_spaces_unicode_and_a_newline_works",
            "test_publish.py::test_check_writable_finds_a_folder_of_someone_else",
        ),
    ),
    Row(
        "L12",
        "a loss, gradient, latent or weight that is not finite",
        "3; 2 for a picture",
        (
            f"{TRAIN}a_run_that_diverges_keeps_the_last_checkpoint_and_names_the_step",
            f"{USER}a_gradient_that_is_infinite_under_a_finite_loss",
            f"{USER}a_picture_that_encodes_to_nan_is_named",
            "test_setup.py::test_eleven_overflows_in_a_row_end_an_fp16_run_and_one_does_not",
            f"{LORA_FILE}numbers_that_are_not_finite_are_never_written",
        ),
    ),
    Row(
        "L13",
        "sampling fails in the middle of a run",
        "0, the LoRA unchanged",
        (
            f"{TRAIN}a_failure_in_sampling_does_not_end_the_run",
            f"{TRAIN}samples_validation_logging_and_saving_do_not_touch_the_training",
        ),
    ),
    Row(
        "L14",
        "a tracker cannot start or write",
        "0 with one warning",
        (
            f"{TRAIN}a_tracker_that_fails_does_not_end_the_run",
            f"{USER}trackers_that_cannot_write_do_not_stop_a_run",
        ),
    ),
    Row(
        "L15",
        "no steps; fewer steps than are done; a checkpoint interval beyond the end; a finished run again",
        "2; 0 for what is only done already",
        (
            f"{RUN}l15_the_lengths_that_make_no_run",
            f"{USER}a_checkpoint_interval_longer_than_the_run_gives_one_at_the_end",
            f"{TRAIN}a_finished_run_has_nothing_to_do",
            f"{TRAIN}more_epochs_continue_a_finished_run",
        ),
    ),
    Row(
        "L16",
        "a thread that decodes pictures fails",
        "2 for a picture; 1 for a bug",
        (
            f"{RUN}l16_a_picture_that_breaks_in_a_decoding_thread_is_named",
            f"{RUN}l16_a_thread_that_fails_otherwise_ends_the_run_with_its_traceback",
        ),
        "a worker process that is killed: pictures are decoded by threads, which die with the run (L1)",
    ),
    Row(
        "D1",
        "pictures without a line of metadata",
        "2; 0 where the policy says so",
        (f"{DATA}refused", f"{DATA}taken", f"{FOLDER}d1_pictures_without_a_line_are_named"),
    ),
    Row(
        "D2",
        "lines that name missing files",
        "2",
        (f"{DATA}refused", f"{FOLDER}d2_all_missing_files_are_named_with_their_lines"),
    ),
    Row(
        "D3",
        "a picture named twice",
        "2",
        (f"{USER}a_fault_of_the_pictures_or_captions", f"{FOLDER}d3_a_picture_named_twice_gives_both_lines"),
    ),
    Row(
        "D4",
        "equal names in sub-folders, one stem with two suffixes",
        "0, with cache entries of their own",
        (
            f"{DATA}taken",
            f"{DATA}d4_equal_names_have_cache_entries_of_their_own",
            f"{FOLDER}d4_equal_names_in_sub_folders_stay_apart",
        ),
    ),
    Row(
        "D5",
        "a name that leaves the folder: dots, absolute, URL, backslash, drive, NUL, a sibling's prefix",
        "2",
        (
            f"{DATA}refused",
            f"{FOLDER}d5_a_name_that_leaves_the_folder_is_refused",
            "faults/test_security.py::test_nothing_outside_the_data_folder_is_opened",
        ),
    ),
    Row(
        "D6",
        "links out of the folder, of pictures, folders and captions; dangling links and links to themselves",
        "2; 0 with allow_symlinks",
        (
            f"{DATA}refused",
            f"{DATA}taken",
            f"{FOLDER}d6_a_link_out_of_the_folder_is_refused_unless_allowed",
            "faults/test_security.py::test_nothing_outside_the_data_folder_is_opened",
        ),
    ),
    Row(
        "D7",
        "lines that are not JSON, or too deep, or no object",
        "2",
        (f"{DATA}refused", f"{FOLDER}d7_a_broken_line_is_shown_with_its_place"),
    ),
    Row(
        "D8",
        "captions in UTF-16 or latin-1",
        "2",
        (f"{DATA}refused", f"{FOLDER}d8_a_wrong_encoding_names_line_and_byte"),
    ),
    Row(
        "D9",
        "BOM, CRLF, blank lines, separators of Unicode",
        "0",
        (f"{DATA}taken", f"{FOLDER}d9_bom_crlf_blank_lines_and_line_separators_are_fine"),
    ),
    Row(
        "D10",
        "no file_name, or another spelling of it",
        "2",
        (f"{DATA}refused", f"{FOLDER}d10_a_missing_file_name_suggests_the_key_that_was_meant"),
    ),
    Row(
        "D11",
        "captions that are null, empty, no text, or half a character",
        "2; 0 where the policy says so",
        (
            f"{DATA}refused",
            f"{FOLDER}d11_a_caption_that_is_no_text_is_refused",
            f"{FOLDER}d11_an_empty_caption_follows_the_policy",
        ),
    ),
    Row(
        "D12",
        "captions longer than the text encoder reads",
        "0 with the words that are lost",
        (
            f"{USER}a_caption_longer_than_the_text_encoder_reads_is_said_by_check",
            f"{USER}a_caption_longer_than_the_text_encoder_reads_is_said_by_a_run",
        ),
    ),
    Row("D13", "metadata without rows", "2", (f"{DATA}refused", f"{FOLDER}d13_empty_metadata_has_no_rows")),
    Row(
        "D14",
        "no folder, an empty one, one of unsupported or hidden files",
        "2",
        (
            f"{DATA}refused",
            f"{FOLDER}d14_a_missing_folder_and_a_file_are_told_apart",
            f"{USER}a_setting_that_is_wrong",
        ),
    ),
    Row(
        "D15",
        "metadata.csv, beside metadata.jsonl or alone",
        "2",
        (f"{DATA}refused", f"{FOLDER}d15_two_metadata_files_are_refused_and_csv_alone_is_not_read"),
    ),
    Row(
        "D16",
        "a caption edited under the same size and time",
        "2 at resume",
        (
            f"{DATA}d16_a_caption_that_was_edited_under_the_same_size_and_time_is_seen",
            f"{FOLDER}d16_an_edited_caption_of_equal_size_and_time_is_seen",
        ),
    ),
    Row(
        "D17",
        "one picture; fewer than the batch; a hundred thousand lines",
        "0; 2 in a screenful",
        (
            f"{DATA}taken",
            f"{DATA}d17_every_picture_is_shown_when_the_batch_is_larger_than_the_data",
            f"{DATA}d17_a_hundred_thousand_lines_are_refused_in_linear_time_and_in_a_screenful",
            "test_order.py::test_fewer_pictures_than_the_batch_still_fill_it",
        ),
    ),
    Row(
        "I1",
        "pictures cut behind their header",
        "2; 0 where the policy says so",
        (
            f"{PICTURES}i1_a_picture_that_is_cut_behind_its_header",
            f"{PICTURES}i1_broken_pictures_may_be_left_out_by_name",
            f"{MORPH}a_picture_that_is_broken_behind_its_header",
            f"{IMAGES}i1_a_truncated_file_is_refused_by_name",
        ),
    ),
    Row(
        "I2",
        "flipped bytes",
        "2 for PNG, and at resume for others",
        (
            f"{PICTURES}i2_a_byte_of_a_png_that_flipped",
            f"{PICTURES}i2_a_byte_of_a_jpeg_that_flipped_decodes_and_is_seen_when_the_run_resumes",
        ),
        "at first sight in JPEG and WebP, which carry no checksum and decode to other pixels",
    ),
    Row(
        "I3",
        "text, an empty file, a git-LFS pointer or a web page with a picture's name",
        "2",
        (f"{PICTURES}refused_from_the_header", f"{PICTURES}i3_a_picture_that_is_not_there"),
    ),
    Row(
        "I4",
        "decompression bombs, from a header alone to a sound file of 169 million pixels",
        "2",
        (
            f"{PICTURES}refused_from_the_header",
            f"{PICTURES}i4_the_memory_of_a_refusal_is_that_of_a_header",
            "faults/test_security.py::test_a_bomb_is_refused_before_a_pixel_of_it_is_decoded",
            f"{IMAGES}i4_a_bomb_is_refused_from_the_header",
        ),
    ),
    Row(
        "I5",
        "CMYK, colour profiles",
        "0, in sRGB",
        (
            f"{PICTURES}taken",
            f"{IMAGES}i5_an_icc_profile_is_converted_to_srgb",
            f"{IMAGES}i5_cmyk_is_converted",
        ),
    ),
    Row(
        "I6",
        "grey of 16 and 32 bits, floating point",
        "0, scaled; 2 for floating point",
        (
            f"{PICTURES}taken",
            f"{PICTURES}refused_from_the_header",
            f"{IMAGES}i6_16_bit_grey_is_scaled_not_clipped",
        ),
    ),
    Row(
        "I7",
        "transparency of every kind",
        "0, on a background, with a note",
        (f"{PICTURES}taken", f"{IMAGES}i7_transparency_is_laid_on_the_background"),
    ),
    Row(
        "I8",
        "animations and several pages",
        "2",
        (
            f"{PICTURES}refused_from_the_header",
            f"{IMAGES}i8_several_frames_are_refused_unless_the_first_is_wanted",
        ),
    ),
    Row(
        "I9",
        "photos that EXIF turns",
        "0, upright",
        (
            f"{PICTURES}i9_every_script_sees_a_turned_photo_upright",
            f"{IMAGES}i9_exif_orientation_is_applied_once",
        ),
    ),
    Row(
        "I10",
        "one pixel, one pixel by six thousand, smaller than trained at",
        "2; 0 with a note",
        (
            f"{PICTURES}i10_sizes_that_training_refuses",
            f"{PICTURES}i10_a_picture_smaller_than_it_is_trained_or_shown_at_is_noted",
        ),
    ),
    Row(
        "I11",
        "HEIC, JPEG XL, SVG and what is no picture; AVIF",
        "2 with the supported types; 0 for AVIF",
        (f"{PICTURES}refused_from_the_header", f"{PICTURES}taken", f"{DATA}refused"),
    ),
    Row(
        "F1",
        "a safetensors file cut anywhere, with bytes too many, or a header that lies",
        "2",
        (
            f"{FILES}refused_from_the_header",
            f"{FILES}refused_from_the_whole_file",
            f"{FILES}a_broken_base",
            f"{FILES}a_merge_into_a_broken_base_leaves_what_was_there",
        ),
    ),
    Row(
        "F2",
        "numbers that are not finite, a name twice, no tensors, shapes that do not multiply, a flipped byte",
        "2",
        (
            f"{FILES}refused_from_the_whole_file",
            f"{FILES}refused_from_the_header",
            f"{FILES}f2_a_byte_of_the_numbers_that_flipped_differs_from_the_hash",
        ),
        "a refusal for a flipped byte: tools that convert files leave a stale hash in them, so "
        "`mix_lora.py inspect` tells the difference and no reader refuses for it",
    ),
    Row(
        "F3",
        "pickles under any name, as LoRA and as base",
        "2, never opened",
        (
            f"{FILES}f3_a_pickle_is_refused_by_every_reader_and_not_opened",
            f"{FILES}f3_a_base_of_pickled_weights_is_refused_and_not_opened",
            "faults/test_security.py::test_no_pickle_is_read_or_written",
        ),
        "a command that converts pickles: none is offered",
    ),
    Row(
        "F4",
        "git-LFS pointers and web pages in place of weights",
        "2",
        (f"{FILES}refused_from_the_header", f"{FILES}a_broken_base"),
    ),
    Row(
        "F5",
        "a LoRA for SDXL, Flux or another width",
        "2",
        (
            f"{FILES}refused_from_the_whole_file",
            f"{FILES}f5_a_lora_of_another_width_says_for_which_base_it_is",
            f"{MORPH}a_lora_for_another_base_or_another_kind_of_file",
        ),
    ),
    Row(
        "F6",
        "a LoRA that lacks something",
        "2 for half a pair",
        (f"{FILES}refused_from_the_whole_file", f"{FILES}f6_a_lora_of_fewer_modules_is_a_whole_lora"),
        "a refusal of fewer modules than a base has: trainers leave modules out on purpose",
    ),
    Row(
        "F7",
        "LoRAs of different rank, alpha, layers and parts in one morph or mix",
        "0, exact in the weights",
        (
            f"{MORPH}a_lora_of_any_rank_and_weight_is_taken_and_weight_zero_is_none",
            f"{MORPH}a_film_ends_on_its_pictures_to_the_bit",
            f"{MIX}the_exact_mix_is_the_weighted_sum_of_deltas_for_any_ranks_alphas_signs_and_modules",
        ),
    ),
    Row(
        "F8",
        "metadata of adapters that is broken, or has unknown fields",
        "2 where it hides the strength; 0",
        (
            f"{FILES}refused_from_the_whole_file",
            f"{FILES}f8_unknown_fields_of_metadata_are_passed_over",
            f"{LORA_FILE}adapter_metadata_that_hides_the_strength_is_refused",
        ),
    ),
    Row(
        "F9",
        "a base that names code, has pickled weights only, or lacks a part",
        "0, the code not run; 2",
        (
            f"{FILES}f9_code_beside_a_base_does_not_run",
            f"{FILES}f3_a_base_of_pickled_weights_is_refused_and_not_opened",
            f"{FILES}a_broken_base",
        ),
    ),
    Row(
        "F10",
        "damaged input of every kind, from a seed",
        "2, never a traceback",
        (
            f"{FILES}f10_damaged_input_raises_nothing_but_errors_for_the_user",
            f"{FILES}f10_the_fuzzer_counts_a_reader_that_fails",
            "test_config.py::test_a_damaged_file_raises_nothing_but_a_config_error",
            f"{IMAGES}mutated_bytes_give_a_picture_or_an_image_error",
        ),
    ),
    Row(
        "C1",
        "unknown keys, at any level",
        "2 with the key that was meant",
        (f"{CONFIGS}refused", f"{CONFIGS}c1_and_c2_within_a_list_of_groups"),
    ),
    Row(
        "C2",
        "values of a wrong type or out of range",
        "2, all at once",
        (
            f"{CONFIGS}refused",
            f"{CONFIGS}c1_and_c2_within_a_list_of_groups",
            f"{CONFIGS}c2_all_faults_come_at_once_in_the_order_of_the_file",
        ),
    ),
    Row("C3", "a key twice", "2 with both lines", (f"{CONFIGS}refused",)),
    Row(
        "C4",
        "what is not JSON, too deep, too long, no object, empty, a folder, or 100 MB",
        "2 with line and column",
        (
            f"{CONFIGS}refused",
            f"{CONFIGS}c4_what_is_no_file_of_a_config_s_size",
            f"{CONFIGS}c4_a_byte_order_mark_is_no_fault",
        ),
    ),
    Row(
        "C5",
        "a key that is accepted and read by nothing",
        "none has it",
        (
            f"{USER}every_key_is_read_by_some_code",
            f"{CONFIGS}c5_every_key_is_read_by_code_that_the_script_runs",
        ),
    ),
    Row(
        "C6",
        "relative paths",
        "0 from the working directory",
        (f"{CONFIGS}c6_relative_paths_start_at_the_working_directory_and_messages_say_so",),
    ),
    Row(
        "C7",
        "a shipped config or a documented command that does not load",
        "0 for each",
        (
            f"{CONFIGS}c7_every_shipped_config_loads",
            f"{CONFIGS}c7_every_documented_command_is_understood",
            f"{USER}every_config_loads_and_names_the_schema",
        ),
    ),
    Row(
        "B1",
        "configs from before a key was one, old names of tensors, fp16 files alone",
        "0",
        (
            f"{LAYOUTS}every_layout_of_one_precision_gives_the_same_bits",
            "test_published.py::test_what_a_config_leaves_out_is_filled_in_and_what_it_says_stays",
        ),
    ),
    Row(
        "B2",
        "a single file without a network: original names, an EMA, fp16, no word of what it predicts",
        "0, with a note on what was assumed",
        (
            f"{SINGLE}a_file_has_the_tensors_of_a_folder",
            f"{SINGLE}a_file_of_the_real_size_is_described_without_any_other",
            f"{SINGLE}what_a_file_of_2x_predicts",
        ),
    ),
    Row(
        "B3",
        "an inpainting, depth or instruct model",
        "2",
        (
            f"{BASES}refused_from_the_header",
            f"{SINGLE}a_model_that_reads_more_than_latents_is_refused_by_its_name",
        ),
    ),
    Row(
        "B4",
        "another model, a LoRA, or a part of a base given as base",
        "2",
        (f"{BASES}refused_from_the_header", f"{SINGLE}another_kind_of_file_is_refused_by_its_name"),
    ),
    Row("B5", "pickled weights only", "2", (f"{BASES}refused_from_the_header",)),
    Row(
        "B6",
        "a repository that is gone, private, gated or misspelt, a folder that is not there",
        "2, before anything big is fetched",
        (
            f"{BASES}refused_from_the_header",
            f"{BASES}what_the_hub_would_have_is_said_where_it_cannot_be_asked",
            f"{HUB}what_cannot_be_used_is_refused_before_any_weights_are_fetched",
        ),
    ),
    Row(
        "B7",
        "a cache without what is not used; one that was cut",
        "0; 2 with what is missing",
        (
            f"{HUB}a_complete_cache_works_offline_whatever_else_is_absent",
            f"{HUB}a_partial_cache_names_what_is_missing_and_is_completed_where_it_can_be",
            f"{BASES}what_the_hub_would_have_is_said_where_it_cannot_be_asked",
        ),
    ),
    Row(
        "B8",
        "a base that changed between a run and its continuation, its configs alone too",
        "2",
        (
            f"{BASES}b8_a_base_that_changed_is_refused_at_resume",
            f"{CHANGED}a_base_that_changed_is_refused_at_resume",
        ),
    ),
    Row(
        "B9",
        "two bases whose weights are the same and whose configs or tokenizers are not",
        "0, with caches, paths and films of their own",
        (
            f"{CHANGED}text_states_of_a_text_encoder_with_fewer_layers_are_made_anew",
            f"{CHANGED}latents_of_a_vae_with_another_config_are_made_anew",
            f"{CHANGED}a_film_of_a_base_that_changed_is_another_film",
        ),
    ),
    Row(
        "B10",
        "a ControlNet that is none, or another base's",
        "2",
        (f"{BASES}a_controlnet_that_does_not_fit",),
    ),
    Row(
        "P1",
        "points outside of the picture, of its crop or of the mask, none, or with targets that overlap",
        "2",
        (
            f"{DRAGS}p1_points_that_cannot_be_moved_are_refused",
            f"{DRAGS}p1_points_that_the_crop_or_the_mask_leaves_out_are_refused",
        ),
    ),
    Row(
        "P2",
        "a mask of another size, black, damaged, or none, in a file or in drag.json",
        "2",
        (f"{DRAGS}p2_a_mask_that_is_none_is_refused",),
    ),
    Row(
        "P3",
        "a LoRA for few steps, or another picture's",
        "2; 0, and it is said",
        (
            f"{DRAGS}p3_a_lora_that_is_not_there_or_is_for_few_steps_is_refused",
            f"{DRAG}a_lora_of_another_picture_is_said",
        ),
    ),
    Row(
        "P4",
        "a start that leaves no step, a block that is not there, a rate under which features are no numbers",
        "2; 3",
        (
            f"{DRAGS}p4_settings_that_cannot_be_meant_are_refused",
            f"{DRAG}a_rate_that_breaks_it_leaves_nothing",
        ),
    ),
    Row(
        "P5",
        "a page of what is no picture; a page saved, and dragged",
        "2; 0",
        (
            f"{DRAGS}p5_a_page_of_what_is_no_picture_is_refused_and_not_written",
            "test_point_page.py::test_two_points_and_a_mask_are_saved_and_dragged",
        ),
    ),
    Row(
        "P6",
        "a drag killed at any moment, or stopped by Ctrl-C",
        "0 after the same command, to the same bytes",
        (
            f"{DRAG}killed_before_any_rename_the_same_command_gives_the_same_bytes",
            f"{DRAG}killed_at_random_the_same_command_gives_the_same_bytes",
            f"{DRAG}ctrl_c_during_a_drag_ends_it_with_130_and_nothing_half_written",
        ),
    ),
    Row(
        "K1",
        "killed while it caches, in the middle of an entry too",
        "0 after the same command",
        (
            f"{CACHES}k1_a_run_killed_while_it_caches_goes_on_where_it_was",
            f"{SHARDS}a_kill_in_any_write_costs_what_was_being_written",
            f"{SHARDS}a_shard_cut_short_holds_what_lies_before_the_cut",
        ),
    ),
    Row(
        "K2",
        "a disk that fills up while it caches",
        "4, and what was cached stays",
        (
            f"{CACHES}k2_a_disk_that_fills_up_keeps_what_was_cached",
            f"{SHARDS}a_write_that_fails_half_way_leaves_what_was_there",
        ),
    ),
    Row(
        "K3",
        "a flipped byte in an entry, its head or the index, before a run or under it",
        "0, made anew; 4 under a run",
        (
            f"{CACHES}k3_a_flipped_byte_costs_what_it_lies_in",
            f"{CACHES}k3_a_byte_that_is_flipped_under_a_run_ends_it_and_the_next_makes_it_anew",
            f"{SHARDS}no_flipped_byte_is_read",
            f"{SHARDS}a_damaged_entry_that_is_made_again_is_read_from_then_on",
        ),
    ),
    Row(
        "K4",
        "two runs on one cache at once",
        "0",
        (
            f"{CACHES}k4_two_runs_fill_one_cache_at_once",
            f"{SHARDS}writers_at_once_have_shards_of_their_own_and_see_each_other_when_they_look",
        ),
    ),
    Row(
        "K5",
        "a cache of an older version",
        "0, made anew and said",
        (
            f"{CACHES}k5_a_cache_of_an_older_version_is_made_anew_and_said",
            f"{SHARDS}what_is_no_shard_of_this_version_holds_nothing",
        ),
    ),
    Row(
        "K6",
        "a read-only cache",
        "0 if it holds what is needed; else 4",
        (f"{USER}a_cache_that_is_full_of_what_is_needed_may_be_read_only",),
    ),
)
