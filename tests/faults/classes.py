"""The classes of faults, and the tests that try each; `make faults` runs them and prints a table.

A fault is bad input, a bad machine, or a process that ends badly: whatever a user may meet without
having done wrong. To try another one, write its test where the part at fault has its tests, or here
where there is no such place, and name it below.
"""

from __future__ import annotations

CLASSES: dict[str, tuple[str, ...]] = {
    "the same film twice": ("faults/test_duplicates.py",),
    "names that spreadsheets or shells would run": ("faults/test_spreadsheets.py",),
    "files that cost more than they weigh": (
        "test_bounds.py",
        "test_decode.py::test_bombs_are_refused_by_their_header",
        "test_grayscale.py::test_frames_larger_than_their_tags_are_refused",
    ),
    "damaged images": (
        "test_decode.py::test_reasons",
        "test_decode.py::test_damaged_jpegs_are_refused",
        "test_decode.py::test_a_bad_checksum_of_pixels_is_called_by_its_name",
        "test_decode.py::test_rows_that_are_missing_from_a_png_are_no_black_ones",
        "test_decode.py::test_a_palette_that_lacks_a_colour_is_damaged",
        "test_decode.py::test_a_jpeg_without_all_of_its_scans_is_refused",
        "test_dicom.py::test_other_jpegs_that_are_cut_are_refused",
        "test_grayscale.py::test_a_damaged_jpeg_in_a_dicom_file_is_refused",
        "test_cache.py::test_broken_files_go_to_quarantine",
        "test_cache.py::test_nothing_decodes",
        "test_train.py::test_broken_images_are_left_out_and_listed",
        "test_train.py::test_a_broken_image_that_goes_is_another_data_set",
    ),
    "DICOM files with wrong tags": (
        "test_dicom.py::test_a_tag_that_cannot_be_read_says_nothing",
        "test_dicom.py::test_broken_and_too_large_files_are_refused",
        "test_dicom.py::test_a_file_without_a_tag_that_it_needs_is_refused",
        "test_dicom.py::test_compressed_pixels_without_a_transfer_syntax_are_refused_by_name",
        "test_dicom.py::test_what_begins_like_dicom_and_is_none",
        "test_grayscale.py::test_a_jpeg_of_other_samples_than_its_tags_say_is_named",
        "test_dicom.py::test_a_decoder_that_is_missing_is_named",
        "test_dicom.py::test_patients_that_all_have_one_identifier_are_the_cause_of_no_folds",
        "test_grayscale.py::test_a_broken_table_is_passed_over_and_told",
        "test_grayscale.py::test_a_window_of_no_use_gives_way_to_the_range_and_is_told",
        "test_grayscale.py::test_a_slope_of_no_use_is_one_and_told",
        "test_grayscale.py::test_tags_that_contradict_each_other_are_named",
        "test_grayscale.py::test_no_tag_of_display_lets_a_warning_through",
    ),
    "trees and archives that are not as they should be": (
        "test_index.py::test_nested_mixed_case_and_litter",
        "test_index.py::test_a_split_folder_is_told_from_its_root",
        "test_index.py::test_zips_of_every_spelling",
        "test_index.py::test_bad_roots",
        "test_table.py::test_folders_that_are_no_classes",
        "test_table.py::test_what_is_wrong_with_a_row_is_named",
        "test_table.py::test_splits_and_weights_that_cannot_be",
        "test_table.py::test_what_is_no_table_is_one_sentence",
        "test_table.py::test_absolute_paths_below_the_root",
        "test_index.py::test_empty_class_folder_is_named",
        "test_index.py::test_one_class_in_the_split_wanted",
        "test_index.py::test_broken_archives",
        "test_index.py::test_archives_of_a_later_version_of_zip",
        "test_index.py::test_npz_of_something_else",
        "test_index.py::test_damaged_zip_member_is_an_error_of_that_file",
    ),
    "links": (
        "test_table.py::test_links_out_of_the_root_are_refused_by_their_row",
        "test_index.py::test_folders_may_be_links_even_in_a_circle",
        "test_index.py::test_links_out_of_the_root_are_left_out_by_name",
        "test_index.py::test_a_film_that_several_links_lead_to_is_listed_once",
        "test_index.py::test_links_from_folder_to_folder_end",
        "test_cache.py::test_a_link_to_nowhere_goes_to_quarantine",
        "test_cli.py::test_heat_maps_are_kept_from_links_and_from_the_next_judging",
    ),
    "names of any bytes": (
        "test_cli.py::test_predict_shows_a_name_of_any_bytes",
        "test_cli.py::test_tables_hold_names_with_carriage_returns",
    ),
    "disks that are full or closed, caches that are damaged": (
        "test_cache.py::test_a_full_disk_is_one_sentence",
        "test_cache.py::test_unwritable_cache_is_named",
        "test_cache.py::test_a_damaged_cache_is_made_anew",
        "test_cache.py::test_interrupted_decoding_leaves_nothing",
        "test_onthefly.py::test_a_film_that_has_changed_is_no_other_film",
        "test_onthefly.py::test_facts_that_are_damaged_are_made_anew",
        "test_cache.py::test_what_killed_processes_left_goes_after_a_day",
        "test_programs.py",
        "test_cli.py::test_an_output_without_room_is_one_sentence",
        "test_train.py::test_a_full_disk_is_told_as_such",
    ),
    "damaged or missing files of a run": (
        "test_train.py::test_a_damaged_latest_checkpoint_gives_way_to_the_one_before",
        "test_train.py::test_a_damaged_best_checkpoint_is_no_silent_answer",
        "test_train.py::test_checkpoints_without_a_config_are_refused",
        "test_train.py::test_a_run_without_its_history_says_so",
        "test_train.py::test_a_run_without_its_checkpoints_or_its_images_says_so",
        "test_release.py::test_a_damaged_release_is_refused",
    ),
    "a run that is gone on with by something else": (
        "test_train.py::test_another_config_is_refused_with_the_difference",
        "test_train.py::test_other_images_are_refused",
        "test_train.py::test_other_versions_are_refused_or_asked_for",
        "test_train.py::test_a_workdir_in_use_is_refused",
        "test_parts.py::test_a_run_is_gone_on_with_by_the_same_parts_alone",
        "test_parts.py::test_a_network_that_cannot_be_made_again_is_asked_for",
    ),
    "numbers that are not finite": (
        "test_steps.py::test_a_step_that_is_not_finite_is_rejected",
        "test_train.py::test_a_diverging_run_says_where",
        "test_train.py::test_a_network_that_an_epochs_last_step_breaks_is_not_kept",
        "test_release.py::test_weights_that_are_not_finite_give_no_answer",
    ),
    "flags and files given to the commands": (
        "test_check.py::test_bad_flags_are_one_sentence_and_status_2",
        "test_check.py::test_what_training_would_refuse_is_said_and_status_2",
        "test_table.py::test_classes_that_cannot_be",
        "test_table.py::test_patterns_of_no_use",
        "test_cli.py::test_bad_input_is_one_sentence_and_status_2",
        "test_cli.py::test_predict_goes_on_past_a_bad_file",
        "test_lungs.py::test_predict_says_that_an_image_is_blank",
        "test_cli.py::test_predict_refuses_by_name_what_is_no_film_of_bearable_size",
        "test_cli.py::test_heat_maps_take_the_place_of_no_image",
        "test_cli.py::test_a_damaged_run_is_named",
        "test_outputs.py::test_an_output_over_a_film_is_refused",
    ),
    "processes that are stopped or killed": (
        "test_onthefly.py::test_films_that_go_and_workers_that_die_are_told",
        "test_onthefly.py::test_workers_end_with_a_process_that_is_killed",
        "test_durable.py",
        "test_outputs.py::test_what_was_written_stays_and_is_whole_when_the_work_fails",
        "test_outputs.py::test_a_killed_process_leaves_what_it_had_judged",
        "test_train.py::test_a_stopped_run_ends_with_the_same_bytes",
        "test_train.py::test_a_best_state_that_is_ahead_of_the_latest_is_written_again",
        "test_train.py::test_an_interrupt_waits_for_a_checkpoint",
        "test_train.py::test_a_signal_saves_within_a_step",
        "test_train.py::test_a_long_epoch_is_saved_on_its_way",
        "test_train.py::test_a_checkpoint_goes_at_once",
        "test_train.py::test_a_line_that_was_left_unfinished_is_dropped",
    ),
    "a run of several processes that loses one": (
        "test_processes.py::test_where_one_is_killed_the_others_end_with_a_sentence",
        "test_processes.py::test_a_process_that_nobody_joins_ends_with_a_sentence",
    ),
    "bytes changed at random": ("faults/test_fuzz.py",),
}
"""For each class, tests by file and name, or all of a file, relative to this folder's parent."""


def class_of(nodeid: str) -> str | None:
    """Returns the class of faults that a test tries; None for one that tries none."""
    name = nodeid.removeprefix("tests/").partition("[")[0]
    for kind, tests in CLASSES.items():
        if name in tests or name.partition("::")[0] in tests:
            return kind
    return None
