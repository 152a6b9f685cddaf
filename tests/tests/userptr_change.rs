//! Registered memory is unmapped, replaced, moved, discarded, protected, truncated: the object follows, the mutator waits for work under way, and
//! neighbours don't matter.

#[macro_use]
mod userptr;

for_devices!([fake dma] change {
    after_munmap_an_acquire_faults_and_after_a_new_mapping_the_device_sees_the_new_contents
    a_mapping_put_over_an_idle_object_takes_its_place
    a_mapping_put_over_a_busy_object_waits_for_the_work
    munmap_of_a_busy_object_waits_for_the_work
    discarding_the_pages_of_a_busy_object_waits_for_the_work
    mappings_put_over_a_busy_object_by_several_threads_at_once_all_wait
    threads_that_replace_each_others_mappings_end_with_an_object_in_step
    a_hole_anywhere_invalidates_the_whole_object_and_a_refill_makes_it_whole
    a_mapping_that_moves_away_leaves_an_invalid_object_and_works_where_it_is
    a_part_that_moves_away_is_a_hole
    pages_that_move_and_leave_the_mapping_leave_an_object_of_fresh_pages
    a_mapping_that_shrinks_leaves_a_hole
    a_mapping_moved_onto_an_object_takes_its_place_idle_or_busy
    discarded_pages_are_taken_anew
    neighbours_may_change_page_by_page_without_any_effect
    what_the_kernel_does_not_report_changes_nothing_by_itself_and_is_right_in_a_bracket
    guard_pages_are_announced_by_invalidate_or_put_in_by_a_bracket
    a_file_that_is_cut_or_punched_in_a_bracket_is_seen_as_it_then_is
    a_bracket_waits_for_the_work_and_nothing_becomes_valid_inside
});
