//! The report for people.

use std::fmt::{self, Display, Formatter};

use crate::Report;
use crate::device::{Device, Found, Row};
use crate::kernel::Kernel;

/// Columns of text before a line of advice is broken.
const WIDTH: usize = 110;

impl Display for Report {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "pinfold {}\n", self.pinfold)?;
        kernel(f, &self.kernel)?;
        if let Some(why) = &self.no_devices {
            writeln!(f, "\nVulkan    {why}")?;
        }
        for (n, it) in self.devices.iter().enumerate() {
            device(f, n, it)?;
        }
        if !self.advice.is_empty() {
            writeln!(f, "\nadvice")?;
        }
        for advice in &self.advice {
            let mut column = 2;
            write!(f, "  -")?;
            for word in advice.split(' ') {
                if column + word.chars().count() > WIDTH {
                    write!(f, "\n   ")?;
                    column = 3;
                }
                write!(f, " {word}")?;
                column += word.chars().count() + 1;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

/// A line of a name and what is said of it.
fn line(f: &mut Formatter<'_>, name: &str, text: impl Display) -> fmt::Result {
    writeln!(f, "  {name:<22}{text}")
}

fn kernel(f: &mut Formatter<'_>, kernel: &Kernel) -> fmt::Result {
    let who = if kernel.uid == 0 { "as root".to_owned() } else { format!("as user {}", kernel.uid) };
    writeln!(f, "kernel    Linux {} on {}, {who}", kernel.release, kernel.machine)?;
    let watch = &kernel.userfaultfd;
    match &watch.error {
        Some(error) => line(f, "userfaultfd", format_args!("no: {error}"))?,
        None => line(f, "userfaultfd", "yes, without privilege (user-mode faults only)")?,
    }
    let can = [
        ("munmap, mremap, madvise", watch.events),
        ("shared memory", watch.shared_memory),
        ("mapped files, written pages", watch.files),
    ];
    let can = can.map(|(what, can)| format!("{what}: {}", if can { "yes" } else { "no" }));
    line(f, "  notices", can.join("; "))?;
    let most = kernel.max_map_count.map_or("?".into(), grouped);
    line(f, "mappings", format_args!("{} of {most} (vm.max_map_count)", grouped(kernel.mappings)))?;
    line(f, "lockable memory", format_args!("{} (RLIMIT_MEMLOCK)", kernel.memlock.map_or("no limit".into(), bytes)))?;
    line(f, "open files", kernel.descriptors.map_or("no limit".into(), grouped))?;
    if let (Some(total), Some(available)) = (kernel.memory_total, kernel.memory_available) {
        line(
            f,
            "memory",
            format_args!(
                "{} of {} available, pages of {}",
                bytes(available),
                bytes(total),
                bytes(kernel.page_size as u64)
            ),
        )?;
    }
    match &kernel.udmabuf.error {
        None => line(f, "dma-buf export", "yes: memory was exported through /dev/udmabuf")?,
        Some(error) => {
            for (n, part) in error.split("; ").enumerate() {
                let (name, no) = if n == 0 { ("dma-buf export", "no: ") } else { ("", "") };
                line(f, name, format_args!("{no}{part}"))?;
            }
        }
    }
    line(f, "dma-buf heaps", if kernel.dma_heaps.is_empty() { "none".into() } else { kernel.dma_heaps.join(", ") })
}

fn device(f: &mut Formatter<'_>, n: usize, device: &Device) -> fmt::Result {
    writeln!(f, "\ndevice {n}  {} ({})", device.name, device.kind)?;
    match (&device.found, &device.error) {
        (Some(found), _) => found_out(f, found),
        (None, Some(error)) => line(f, "can't be used", error),
        (None, None) => Ok(()),
    }
}

fn found_out(f: &mut Formatter<'_>, found: &Found) -> fmt::Result {
    line(f, "driver", format_args!("{}, Vulkan {}", found.driver, found.vulkan))?;
    if let Some(messages) = found.validation_messages {
        line(f, "validation layer", if messages == 0 { "silent".into() } else { format!("{messages} messages") })?;
    }
    for extension in &found.extensions {
        let mark = if extension.present { "yes" } else { "no " };
        line(f, mark, format_args!("{:<36}{}", extension.name, extension.purpose))?;
    }
    let limits = &found.limits;
    line(f, "import alignment", bytes(limits.import_alignment))?;
    line(
        f,
        "largest import",
        format_args!(
            "{}; larger ranges come in chunks (the driver says {})",
            bytes(limits.chunk_size),
            bytes(limits.max_allocation_size)
        ),
    )?;
    line(f, "imports at a time", grouped(limits.max_allocations.into()))?;
    line(
        f,
        "storage binding",
        format_args!(
            "at most {}, at multiples of {} B",
            bytes(limits.max_storage_buffer_range.into()),
            limits.storage_offset_alignment
        ),
    )?;
    for (n, family) in found.queue_families.iter().enumerate() {
        line(f, &format!("queue family {n}"), format_args!("{} x {}", family.queues, family.does))?;
    }
    for (n, kind) in found.memory_types.iter().enumerate() {
        line(f, &format!("memory type {n}"), format_args!("heap {}: {}", kind.heap, kind.flags))?;
    }
    for (n, heap) in found.heaps.iter().enumerate() {
        let left = match (heap.budget, heap.used) {
            (Some(budget), Some(used)) => format!("budget {}, {} in use", bytes(budget), bytes(used)),
            _ => "the driver doesn't tell how much is left".to_owned(),
        };
        let place = if heap.device_local { "the device's" } else { "the host's" };
        line(f, &format!("heap {n}"), format_args!("{}, {place}; {left}", bytes(heap.size)))?;
    }
    let pinned = match found.pinned {
        None => "not known".into(),
        Some(0) => "no pages (VmPin): the device goes through page tables, or doesn't tell the kernel".into(),
        Some(count) => format!("{} (VmPin)", bytes(count)),
    };
    line(f, "an import pins", pinned)?;
    line(f, "dma-buf import", &found.dmabuf_import)?;
    if let Some(force) = &found.forced {
        line(f, "forced", force)?;
    }
    writeln!(
        f,
        "\n  {:<45}{:<14}{:<14}{:>12}{:>12}",
        "memory (16 MiB each)", "goes by", "changes are", "acquire us", "copy us"
    )?;
    found.memory.iter().try_for_each(|row| self::row(f, row))
}

fn row(f: &mut Formatter<'_>, row: &Row) -> fmt::Result {
    let time = |time: Option<f64>| time.map_or("-".to_owned(), |us| format!("{us:.1}"));
    let noticed = if row.coverage == "Watched" { "noticed".to_owned() } else { row.coverage.clone() };
    writeln!(
        f,
        "  {:<45}{:<14}{:<14}{:>12}{:>12}",
        row.memory,
        row.path,
        noticed,
        time(row.acquire_us),
        time(row.copy_us)
    )
}

/// 1.5 GiB
pub(crate) fn bytes(count: u64) -> String {
    let units = [(1_u64 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match units.into_iter().find(|&(unit, _)| count >= unit) {
        None => format!("{count} B"),
        Some((unit, name)) if count.is_multiple_of(unit) => format!("{} {name}", count / unit),
        Some((unit, name)) => format!("{}.{} {name}", count / unit, count % unit * 10 / unit),
    }
}

/// 65,530
fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let first = digits.len() % 3;
    let mut text = digits[..first].to_owned();
    for part in digits.as_bytes()[first..].chunks(3) {
        if !text.is_empty() {
            text.push(',');
        }
        text.push_str(&String::from_utf8_lossy(part));
    }
    text
}
