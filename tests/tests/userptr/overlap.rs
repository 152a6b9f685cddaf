//! Objects over each other, in every way two ranges can lie.

use std::ops::Range;

use pinfold_core::{Access, State, Userptr};
use pinfold_tests::memory::{Backing, Region};

use super::{Rig, device_sees, program_sees};

const PAGES: usize = 12;
/// The pages of the first object; what the second one has gives the name.
const FIRST: Range<usize> = 4..8;
const SECOND: [(&str, Range<usize>); 8] = [
    ("before, touching", 0..4),
    ("after, touching", 8..12),
    ("the same", 4..8),
    ("over the start", 2..6),
    ("over the end", 6..10),
    ("inside", 5..7),
    ("around", 2..10),
    ("around, flush at the end", 0..8),
];

// rows: igt/{unsync,sync}-overlap; peers/merging-is-harmful
pub fn overlapping_objects_see_the_same_memory_and_each_is_invalidated_by_its_own_pages_only<R: Rig>(rig: &R) {
    for (form, second) in SECOND {
        let region = Region::new(Backing::Anonymous, PAGES).unwrap();
        let pages = [FIRST, second];
        let objects: [Userptr<R::D>; 2] = [(0, Access::Read), (1, Access::ReadWrite)].map(|(which, access)| {
            let range = region.part(pages[which].clone());
            // SAFETY: no reference points into a region, and every mutation is held off.
            unsafe { rig.manager().register(range, access) }.unwrap()
        });
        let in_step = || {
            for (object, pages) in objects.iter().zip(&pages) {
                assert_eq!(device_sees(rig, object), program_sees(&region)[pages.clone()], "{form}");
            }
        };
        in_step();
        for page in 0..PAGES {
            let before = objects.each_ref().map(|object| object.generation().unwrap());
            region.map_over(page..page + 1).unwrap();
            for (which, object) in objects.iter().enumerate() {
                let hit = pages[which].contains(&page);
                let wanted = if hit { State::Invalid } else { State::Valid };
                assert_eq!(object.state().unwrap(), wanted, "{form}: object {which}, page {page}");
                assert_eq!(object.generation().unwrap() > before[which], hit, "{form}: object {which}, page {page}");
            }
            region.fill(page..page + 1, 0x80 + u8::try_from(page).unwrap()).unwrap();
            in_step();
        }
    }
}
