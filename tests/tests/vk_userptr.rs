//! Userptr objects on a real Vulkan driver: the behaviours that the other devices are asked for, with the validation layer watching.

#[macro_use]
mod userptr;

use pinfold_tests::gpu;

use userptr::alone;
use userptr::vulkan::Vulkan;

/// Makes a test of each behaviour, on the driver.
macro_rules! on_the_driver {
    ($($cases:ident { $($case:ident)+ })+) => {
        $(mod $cases {
            use super::*;
            $(#[test]
            fn $case() {
                let _alone = alone();
                userptr::$cases::$case(&Vulkan::new(gpu!()));
            })+
        })+
    };
}

on_the_driver! {
    change {
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
    }
    silent {
        an_operation_without_an_event_leaves_the_object_valid_and_a_device_with_pins_stale
        an_operation_without_an_event_is_right_inside_a_bracket
        an_operation_without_an_event_is_right_after_it_has_been_told
    }
    igt {
        probe
        huge_split
        stress_mm_invalidate_close
        sizes
        mlocked
    }
    overlap {
        overlapping_objects_see_the_same_memory_and_each_is_invalidated_by_its_own_pages_only
    }
    part {
        a_part_is_populated_watched_and_taken_and_nothing_around_it
        a_part_and_its_whole_see_the_same_memory_of_every_kind
        only_what_happens_to_its_own_pages_makes_a_part_stale
        work_on_a_part_does_not_hold_who_unmaps_the_rest
        a_part_is_prefetched_like_an_object
    }
    register {
        null_registers_and_faults_when_it_is_acquired
        every_layout_of_holes_and_forbidden_pages_is_refused_until_it_is_whole
        memory_without_permission_is_a_fault
        a_device_does_not_get_to_write_where_the_program_may_not
        device_mappings_are_a_fault
    }
    race {
        a_device_never_reads_what_a_mutation_that_has_returned_took_away
        a_page_that_comes_and_goes_is_never_valid_without_being_watched
        an_old_lease_never_gets_through_however_often_the_object_becomes_valid_again
        whoever_has_returned_from_a_mutation_never_finds_the_object_as_valid_as_before
    }
}
