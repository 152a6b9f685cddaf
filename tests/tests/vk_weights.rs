//! What a language model's runtime does: a file of weights is mapped, and matrix-vector products are computed from the mapping, through views as
//! large as the device binds. The same through a copy. Results are exact, and equal to the CPU's; what each way takes in memory is told.
//!
//! `PINFOLD_WEIGHTS_MIB` sets the size of the file (default 96 MiB; `scripts/soak` takes 2048). Each way runs in a process of its own, so that its
//! memory can be told from the other's.

#[path = "../../vulkan/tests/fixture/mod.rs"]
mod fixture;
mod shader;

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::os::fd::AsFd;
use std::process::Command;
use std::ptr::NonNull;

use ash::vk;
use fixture::{Fixture, Readback};
use nix::libc;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use pinfold_vulkan::{Access, Config, Force, HostRange, Manager, Path};
use shader::Compute;

/// Weights in a row. A row is 16 KiB.
const COLUMNS: usize = 4096;
const ROW: usize = COLUMNS * 4;
/// Weights repeat after this many, so that no two rows of the small file are alike.
const PERIOD: usize = 8191;
const WAY: &str = "PINFOLD_TEST_WEIGHTS";

/// Small whole numbers, so that sums of their products are exact in any order.
fn small(n: usize) -> f32 {
    f32::from(u8::try_from(n.wrapping_mul(2_654_435_761) >> 7 & 7).expect("three bits")) - 3.0
}

fn weights() -> Vec<f32> {
    (0..PERIOD + COLUMNS).map(small).collect()
}

/// Where row `row` starts among [`weights`].
fn start(row: usize) -> usize {
    row * 7 % PERIOD
}

fn vector() -> Vec<f32> {
    (0..COLUMNS).map(|n| small(3 * n + 1)).collect()
}

fn bytes(numbers: &[f32]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_ne_bytes()).collect()
}

#[test]
fn products_from_mapped_weights_are_the_cpus_and_take_no_second_copy() {
    if let Ok(way) = std::env::var(WAY) {
        return compute(&way);
    }
    if fixture::choose_driver().is_none() {
        return;
    }
    let grown = ["import", "mirror"].map(|way| {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "products_from_mapped_weights_are_the_cpus_and_take_no_second_copy", "--nocapture"])
            .env(WAY, way)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&child.stdout);
        assert!(child.status.success(), "{way}: {said}{}", String::from_utf8_lossy(&child.stderr));
        let line = said.lines().find_map(|line| line.split_once("MEMORY ")).expect("a line of figures").1.to_owned();
        println!("{way}: {line}");
        line.split(' ').next().unwrap().parse::<usize>().unwrap()
    });
    let size = mib() << 20;
    assert!(grown[0] < size / 4, "in place, the process grew by {} bytes", grown[0]);
    assert!(grown[1] > size * 3 / 4, "a copy of {size} bytes is somewhere, and the process grew by {} bytes", grown[1]);
}

fn mib() -> usize {
    std::env::var("PINFOLD_WEIGHTS_MIB").ok().map_or(96, |text| text.parse().expect("a number of MiB"))
}

/// A nameless file of so many rows, on a disk if there is one.
fn file(rows: usize) -> File {
    use std::os::unix::fs::OpenOptionsExt;
    let folder = if fs::metadata("/var/tmp").is_ok() { "/var/tmp".into() } else { std::env::temp_dir() };
    let file = File::options().read(true).write(true).custom_flags(libc::O_TMPFILE).mode(0o600).open(folder).unwrap();
    let (mut to, all) = (BufWriter::with_capacity(1 << 20, &file), bytes(&weights()));
    for row in 0..rows {
        to.write_all(&all[start(row) * 4..][..ROW]).unwrap();
    }
    to.flush().unwrap();
    drop(to);
    file
}

/// Memory of the process that isn't the page cache's, in bytes: what it has, and the most it had of any kind.
fn memory() -> (usize, usize) {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let field = |name: &str| -> usize {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_whitespace().next().unwrap().parse::<usize>().unwrap() * 1024
    };
    (field("RssAnon:") + field("RssShmem:"), field("VmHWM:"))
}

fn compute(way: &str) {
    let Some(fixture) = Fixture::new() else { return };
    let rows = (mib() << 20) / ROW;
    let (file, len) = (file(rows), rows * ROW);
    let mut config = Config::default();
    config.force = (way == "mirror").then_some(Force::Mirror);
    // SAFETY: the fixture's handles belong together, and the manager is dropped first.
    let manager = unsafe { Manager::new(fixture.context(), config) }.unwrap();
    // At an edge of rows and chunks: 2 MiB. Private and writable, because the buffers of read-only mappings can't be bound as storage; nothing
    // writes, so no page is ever copied.
    const EDGE: usize = 2 << 20;
    let (access, flags) = (ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE);
    // SAFETY: a new mapping at an address that the kernel chooses.
    let room =
        unsafe { mmap(None, (len + EDGE).try_into().unwrap(), ProtFlags::PROT_NONE, flags, file.as_fd(), 0) }.unwrap();
    let at = room.addr().get().next_multiple_of(EDGE);
    let fixed = flags | MapFlags::MAP_FIXED;
    // SAFETY: inside the mapping above, which only this function knows.
    unsafe { mmap(Some(at.try_into().unwrap()), len.try_into().unwrap(), access, fixed, file.as_fd(), 0) }.unwrap();
    let range = HostRange::new(at, len).unwrap();

    let (before, _) = memory();
    // SAFETY: the mapping is unmapped after the manager is gone; nobody has references to it, and no byte of it is written.
    let object = unsafe { manager.register(range, Access::Read) }.unwrap();
    let lease = manager.acquire_timeout(&[&object], fixture::GENEROUS * 4).unwrap();
    let view = lease.view(0);
    assert_eq!(matches!(view.path, Path::Mirror(_)), way == "mirror", "{:?}", view.path);

    // As large as the device binds; in the small run an eighth of the file, so that there are several all the same.
    let most = u64::from(manager.capabilities().max_storage_buffer_range).min(128 << 20);
    let most = if mib() > 256 { most } else { most.min(len as u64 / 8) } / ROW as u64 * ROW as u64;
    let mut views = Vec::new();
    for chunk in view.chunks() {
        assert!(chunk.at.is_multiple_of(ROW as u64), "chunks end at the edges of rows");
        for at in (0..chunk.size).step_by(usize::try_from(most).unwrap()) {
            let size = most.min(chunk.size - at);
            views.push((chunk.buffer, chunk.offset + at, size, u32::try_from((chunk.at + at) / ROW as u64).unwrap()));
        }
    }
    assert!(views.len() >= 8, "{} views", views.len());
    let compute = Compute::new(
        &fixture,
        include_bytes!(concat!(env!("OUT_DIR"), "/product.spv")),
        &[vk::DescriptorType::STORAGE_BUFFER; 3],
        u32::try_from(views.len()).unwrap(),
    );
    let (input, groups) = (Readback::new(&fixture, ROW as u64), Readback::new(&fixture, 12 * views.len() as u64));
    let output = Readback::new(&fixture, rows as u64 * 4);
    input.put(&bytes(&vector()));
    let counts = views.iter().flat_map(|view| [u32::try_from(view.2 / ROW as u64).unwrap().div_ceil(64), 1, 1]);
    groups.put(&counts.flat_map(u32::to_ne_bytes).collect::<Vec<u8>>());
    fixture.run(|commands| {
        for (n, &(buffer, offset, size, first_row)) in views.iter().enumerate() {
            let whole = |readback: &Readback<'_>| (readback.buffer, 0, vk::WHOLE_SIZE);
            let set = compute.set(&[(buffer, offset, size), whole(&input), whole(&output)]);
            compute.dispatch(commands, set, first_row, (groups.buffer, 12 * n as u64));
        }
    });
    let (after, peak) = memory();

    let (all, vector) = (weights(), vector());
    // Rows repeat after a period, so each product is computed once.
    let product = |start: usize| -> f32 { all[start..start + COLUMNS].iter().zip(&vector).map(|(a, b)| a * b).sum() };
    let expected: Vec<_> = (0..rows.min(PERIOD)).map(|row| product(start(row))).collect();
    let seen = output.bytes();
    for (row, seen) in seen.chunks_exact(4).enumerate() {
        let seen = f32::from_ne_bytes(seen.try_into().unwrap());
        assert!(seen == expected[row % PERIOD], "row {row}: {seen}, not {}", expected[row % PERIOD]);
    }
    assert!(expected.iter().any(|&product| product != expected[0]), "products differ");
    let (grown, chunks) = (after.saturating_sub(before), view.chunks().len());
    println!(
        "MEMORY {grown} bytes of its own for {len} bytes of weights ({} views, {chunks} chunks, {:?}); VmHWM {peak}",
        views.len(),
        view.path
    );
    drop((compute, lease, object, manager));
    // SAFETY: nobody uses the mapping any more.
    unsafe { munmap(NonNull::new(room.as_ptr()).unwrap(), len + EDGE) }.unwrap();
}
