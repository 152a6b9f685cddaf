//! Two galaxies that meet: a million stars that feel two heavy centres, moved by all cores. Each star is 32 bytes, and those bytes are what the GPU
//! draws.

use std::ptr::NonNull;

use glam::Vec3;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use pinfold_vulkan::{HostRange, page_size};
use rayon::prelude::*;

/// Paces per frame.
const STEPS: usize = 3;
const PACE: f32 = 0.012;
/// Keeps stars that pass a centre closely from being thrown out.
const SOFTENING: f32 = 0.05;

/// A star, as the shader reads it.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Star {
    pub(crate) position: [f32; 3],
    /// 0 for the first galaxy, 1 for the second.
    pub(crate) kind: f32,
    pub(crate) velocity: [f32; 3],
    pub(crate) unused: f32,
}

/// A heavy centre.
#[derive(Debug, Clone, Copy)]
struct Centre {
    position: Vec3,
    velocity: Vec3,
    mass: f32,
}

/// Stars in memory of their own: a mapping, so that it is no allocator's.
pub(crate) struct Simulation {
    at: NonNull<Star>,
    count: usize,
    centres: [Centre; 2],
}

impl Simulation {
    /// `count` stars, the same ones every time.
    pub(crate) fn new(count: usize) -> nix::Result<Self> {
        let len = (count * size_of::<Star>()).try_into().map_err(|_| nix::errno::Errno::EINVAL)?;
        let write = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let at = unsafe { mmap_anonymous(None, len, write, MapFlags::MAP_PRIVATE) }?.cast();
        let centres = [
            Centre { position: Vec3::new(-0.95, -0.16, 0.05), velocity: Vec3::new(0.42, 0.13, 0.0), mass: 1.0 },
            Centre { position: Vec3::new(1.25, 0.22, -0.1), velocity: Vec3::new(-0.56, -0.17, 0.0), mass: 0.75 },
        ];
        let mut this = Self { at, count, centres };
        this.stars().par_iter_mut().enumerate().for_each(|(n, star)| *star = born(n, count, &centres));
        Ok(this)
    }

    /// The stars. To be called when no work that reads them is under way.
    fn stars(&mut self) -> &mut [Star] {
        // SAFETY: the mapping holds so many stars, any bytes are a star, and `&mut self` is the only way to them; the device only reads, and
        // does not while this is called.
        unsafe { std::slice::from_raw_parts_mut(self.at.as_ptr(), self.count) }
    }

    /// Moves everything by one frame, on all cores. To be called when no work that reads the stars is under way.
    pub(crate) fn step(&mut self) {
        for _ in 0..STEPS {
            let before = self.centres;
            for (n, centre) in self.centres.iter_mut().enumerate() {
                let other = &before[1 - n];
                centre.velocity += pull(centre.position, other, 0.15) * PACE;
                centre.position += centre.velocity * PACE;
            }
            let centres = self.centres;
            self.stars().par_iter_mut().with_min_len(4096).for_each(|star| {
                let mut velocity = Vec3::from_array(star.velocity);
                let position = Vec3::from_array(star.position);
                velocity += (pull(position, &centres[0], SOFTENING) + pull(position, &centres[1], SOFTENING)) * PACE;
                star.velocity = velocity.to_array();
                star.position = (position + velocity * PACE).to_array();
            });
        }
    }

    pub(crate) fn range(&self) -> HostRange {
        let pages = self.bytes().next_multiple_of(page_size());
        HostRange::from_ptr(self.at.as_ptr(), pages).expect("a mapping is a range")
    }

    pub(crate) fn bytes(&self) -> usize {
        self.count * size_of::<Star>()
    }

    pub(crate) fn first(&self) -> *const u8 {
        self.at.as_ptr().cast_const().cast()
    }
}

impl Drop for Simulation {
    fn drop(&mut self) {
        let len = self.bytes();
        // SAFETY: the mapping is this value's, and objects over it are gone (see `main`).
        let _ = unsafe { munmap(self.at.cast(), len) };
    }
}

fn pull(at: Vec3, centre: &Centre, softening: f32) -> Vec3 {
    let to = centre.position - at;
    let squared = to.length_squared() + softening * softening;
    to * (centre.mass / (squared * squared.sqrt()))
}

/// Star `n` on a circle around its galaxy's centre, in a disc that lies askew.
fn born(n: usize, count: usize, centres: &[Centre; 2]) -> Star {
    let mut seed = n as u64;
    let mut random = || {
        // SplitMix64
        seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = seed.wrapping_mul(0xbf58_476d_1ce4_e5b9) ^ (n as u64).rotate_left(32);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1 << 24) as f32
    };
    let second = n >= count * 4 / 7;
    let centre = &centres[usize::from(second)];
    let size = if second { 0.50 } else { 0.66 };
    // Thinner towards the rim, with two arms.
    let radius = size * (0.03 - 0.36 * (1.0 - 0.96 * random()).ln());
    let arm = if random() < 0.5 { 0.0 } else { std::f32::consts::PI };
    let angle = arm + 5.2 * (radius / size) + (random() + random() + random() - 1.5) * 1.7;
    let thick = (random() + random() - 1.0) * 0.025;
    let flat = Vec3::new(radius * angle.cos(), thick, radius * angle.sin());
    let speed = (centre.mass * radius * radius / (radius * radius + SOFTENING * SOFTENING).powf(1.5)).sqrt();
    let round = Vec3::new(-angle.sin(), 0.0, angle.cos()) * speed;
    let tilt = if second {
        glam::Quat::from_rotation_z(0.9) * glam::Quat::from_rotation_x(-0.5)
    } else {
        glam::Quat::from_rotation_x(0.75)
    };
    Star {
        position: (centre.position + tilt * flat).to_array(),
        kind: f32::from(u8::from(second)),
        velocity: (centre.velocity + tilt * round).to_array(),
        unused: 0.0,
    }
}
