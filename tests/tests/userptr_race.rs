//! Submitters against mutators, many times over, with oracles that notice a read of pages that are gone.

#[macro_use]
mod userptr;

mod seen_through_pins {
    use super::userptr;
    for_devices!([dma] race {
        a_device_never_reads_what_a_mutation_that_has_returned_took_away
    });
}

for_devices!([fake dma] race {
    a_page_that_comes_and_goes_is_never_valid_without_being_watched
    an_old_lease_never_gets_through_however_often_the_object_becomes_valid_again
    whoever_has_returned_from_a_mutation_never_finds_the_object_as_valid_as_before
});
