//! One Vulkan device: what it says of itself, what it does with each kind of memory, and what that costs.

use std::hint::black_box;
use std::ptr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use ash::{ext, khr, vk};
use pinfold_demos::device::{Gpu, Validation};
use pinfold_demos::resource::Buffer;
use pinfold_vulkan::{Access, Config, Manager, MappingKind, MirrorReason, Path, Support, Userptr};
use serde::Serialize;

use crate::kernel::{Kernel, field};
use crate::memory::Sample;

/// How much of each kind of memory is imported and copied: 16 MiB.
pub(crate) const SAMPLE: usize = 16 << 20;
/// How often; the medians are told.
const TIMES: usize = 5;
/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(30);

/// Extensions that matter to Pinfold, or to a program that hands memory around.
const EXTENSIONS: [(&std::ffi::CStr, &str); 9] = [
    (ext::external_memory_host::NAME, "imports host memory"),
    (ext::memory_budget::NAME, "tells how much memory is left"),
    (khr::timeline_semaphore::NAME, "tells when work is over; core since 1.2"),
    (khr::buffer_device_address::NAME, "buffers by address; core since 1.2"),
    (khr::external_memory_fd::NAME, "memory between Vulkan devices and processes"),
    (ext::external_memory_dma_buf::NAME, "dma-bufs"),
    (ext::image_drm_format_modifier::NAME, "images in dma-bufs"),
    (ext::queue_family_foreign::NAME, "hands resources to other devices"),
    (ext::physical_device_drm::NAME, "tells the kernel's device"),
];

#[derive(Serialize)]
pub(crate) struct Device {
    pub(crate) name: String,
    pub(crate) kind: &'static str,
    /// Why it can't be used, if it can't; what follows is empty then.
    pub(crate) error: Option<String>,
    #[serde(flatten)]
    pub(crate) found: Option<Found>,
}

#[derive(Serialize)]
pub(crate) struct Found {
    pub(crate) vulkan: String,
    pub(crate) driver: String,
    pub(crate) validation_messages: Option<u64>,
    pub(crate) extensions: Vec<Extension>,
    pub(crate) limits: Limits,
    pub(crate) queue_families: Vec<Family>,
    pub(crate) memory_types: Vec<MemoryType>,
    pub(crate) heaps: Vec<Heap>,
    /// Bytes that were pinned by an import of [`SAMPLE`] bytes, as the kernel counts them (VmPin).
    pub(crate) pinned: Option<u64>,
    /// The answer to the import of a dma-buf, or why none was tried.
    pub(crate) dmabuf_import: String,
    pub(crate) forced: Option<String>,
    pub(crate) memory: Vec<Row>,
}

#[derive(Serialize)]
pub(crate) struct Extension {
    pub(crate) name: String,
    pub(crate) purpose: &'static str,
    pub(crate) present: bool,
}

/// In bytes, unless it is a count.
#[derive(Serialize)]
pub(crate) struct Limits {
    pub(crate) import_alignment: u64,
    pub(crate) chunk_size: u64,
    pub(crate) max_allocation_size: u64,
    pub(crate) max_allocations: u32,
    pub(crate) max_storage_buffer_range: u32,
    pub(crate) storage_offset_alignment: u64,
    pub(crate) uniform_offset_alignment: u64,
}

#[derive(Serialize)]
pub(crate) struct Family {
    pub(crate) queues: u32,
    pub(crate) does: String,
}

#[derive(Serialize)]
pub(crate) struct MemoryType {
    pub(crate) heap: u32,
    pub(crate) flags: String,
}

#[derive(Serialize)]
pub(crate) struct Heap {
    pub(crate) size: u64,
    pub(crate) device_local: bool,
    pub(crate) budget: Option<u64>,
    pub(crate) used: Option<u64>,
}

/// What happens to one kind of memory.
#[derive(Serialize)]
pub(crate) struct Row {
    pub(crate) memory: String,
    pub(crate) source: String,
    pub(crate) writable: bool,
    /// The answer to the trial import.
    pub(crate) trial: String,
    /// The path of an object that was acquired, or why there is none.
    pub(crate) path: String,
    /// Whether its mutations are noticed.
    pub(crate) coverage: String,
    /// Medians, in microseconds: from `acquire` to the lease, the memory being there; and a copy of it into a buffer that was used before.
    pub(crate) acquire_us: Option<f64>,
    pub(crate) copy_us: Option<f64>,
    #[serde(skip)]
    pub(crate) mirrored: bool,
}

impl Device {
    pub(crate) fn ask(index: usize, validation: Validation, kernel: &Kernel) -> Self {
        let gpu = match Gpu::open_at(index, validation) {
            Ok(gpu) => gpu,
            Err(error) => {
                let (name, kind) = (format!("device {index}"), "?");
                return Self { name, kind, error: Some(format!("{error:#}")), found: None };
            }
        };
        let kind = match gpu.properties.device_type {
            vk::PhysicalDeviceType::DISCRETE_GPU => "discrete GPU",
            vk::PhysicalDeviceType::INTEGRATED_GPU => "integrated GPU",
            vk::PhysicalDeviceType::VIRTUAL_GPU => "virtual GPU",
            vk::PhysicalDeviceType::CPU => "CPU driver",
            _ => "other",
        };
        let (found, error) = match Found::ask(&gpu, kernel) {
            Ok(found) => (Some(found), None),
            Err(error) => (None, Some(format!("{error:#}"))),
        };
        Self { name: gpu.name(), kind, error, found }
    }
}

impl Found {
    fn ask(gpu: &Gpu, kernel: &Kernel) -> Result<Self> {
        // SAFETY: the handles are the device's own, and the manager is dropped before it.
        let manager = unsafe { Manager::new(gpu.context(), Config::default()) }?;
        let rows = MappingKind::ALL.into_iter().map(|kind| Row::ask(gpu, &manager, kind)).collect();
        let pinned = pinned(&manager);
        let (caps, limits) = (manager.capabilities(), &gpu.properties.limits);
        let version = caps.api_version;
        let (major, minor) = (vk::api_version_major(version), vk::api_version_minor(version));
        let found = Self {
            vulkan: format!("{major}.{minor}.{}", vk::api_version_patch(version)),
            driver: format!("{} {}", caps.driver_name, caps.driver_info).trim().to_owned(),
            validation_messages: None,
            extensions: extensions(gpu)?,
            limits: Limits {
                import_alignment: caps.import_alignment,
                chunk_size: caps.chunk_size,
                max_allocation_size: max_allocation_size(gpu),
                max_allocations: caps.max_allocations,
                max_storage_buffer_range: caps.max_storage_buffer_range,
                storage_offset_alignment: limits.min_storage_buffer_offset_alignment,
                uniform_offset_alignment: limits.min_uniform_buffer_offset_alignment,
            },
            queue_families: families(gpu),
            memory_types: memory_types(gpu),
            heaps: heaps(gpu),
            pinned,
            dmabuf_import: dmabuf_import(&manager, kernel),
            forced: manager.device().forced().map(|force| format!("{force:?}")),
            memory: rows,
        };
        drop(manager);
        Ok(Self { validation_messages: gpu.is_validated().then(|| gpu.messages()), ..found })
    }
}

impl Row {
    fn ask(gpu: &Gpu, manager: &Manager, kind: MappingKind) -> Self {
        let mut row = Self {
            memory: kind.to_string(),
            source: format!("{:?}", kind.source),
            writable: kind.writable,
            trial: manager.device().trial(kind).to_string(),
            path: String::new(),
            coverage: String::new(),
            acquire_us: None,
            copy_us: None,
            mirrored: false,
        };
        let measured =
            Sample::new(kind, SAMPLE).map_err(anyhow::Error::msg).and_then(|sample| row.measure(gpu, manager, &sample));
        if let Err(error) = measured {
            row.path = format!("{error:#}");
        }
        row
    }

    fn measure(&mut self, gpu: &Gpu, manager: &Manager, sample: &Sample) -> Result<()> {
        let mut acquires = Vec::new();
        for _ in 0..TIMES {
            let object = register(manager, sample)?;
            let begun = Instant::now();
            let lease = manager.acquire_timeout(&[&object], PATIENCE)?;
            acquires.push(begun.elapsed());
            self.path = in_words(lease.view(0).path);
            self.mirrored = matches!(lease.view(0).path, Path::Mirror(_));
            self.coverage = object.coverage().map_or("not watched".to_owned(), |coverage| format!("{coverage:?}"));
        }
        self.acquire_us = Some(median(acquires));

        use vk::MemoryPropertyFlags as Flags;
        let wishes = [Flags::HOST_VISIBLE | Flags::HOST_COHERENT];
        let to = Buffer::new(gpu, SAMPLE as u64, vk::BufferUsageFlags::TRANSFER_SRC, &wishes)?;
        let mapped = to.mapped().context("host-visible memory can't be mapped")?;
        let copies = (0..=TIMES).map(|_| {
            let begun = Instant::now();
            // SAFETY: both have that size, the device uses neither, and nobody else writes to them.
            unsafe { ptr::copy_nonoverlapping(sample.bytes(), mapped, SAMPLE) };
            black_box(mapped);
            begun.elapsed()
        });
        // The first one also waits for the buffer's pages.
        self.copy_us = Some(median(copies.skip(1).collect()));
        Ok(())
    }
}

fn register(manager: &Manager, sample: &Sample) -> Result<Userptr> {
    // SAFETY: the sample is unmapped after the object is gone, nobody has references to its bytes, and no work is ever submitted.
    Ok(unsafe { manager.register_labelled(sample.range(), Access::Read, "doctor") }?)
}

/// How an object reached the device.
fn in_words(path: Path) -> String {
    match path {
        Path::Import => "import".to_owned(),
        Path::AliasImport => "alias import".to_owned(),
        Path::Mirror(reason) => format!("copy ({reason:?})"),
        other => format!("{other:?}"),
    }
}

/// The middle one, in microseconds with one decimal.
fn median(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    (times[times.len() / 2].as_secs_f64() * 1e7).round() / 10.0
}

/// Whether the device takes a dma-buf of this process's memory.
fn dmabuf_import(manager: &Manager, kernel: &Kernel) -> String {
    let supported = manager.capabilities().dmabuf;
    match (manager.device().dmabuf_trial(), &kernel.udmabuf.error) {
        _ if supported != Support::Usable => format!("no: {supported}"),
        (Ok(()), _) => "yes: one was made and imported".into(),
        (Err(_), Some(_)) => "not tried, as none can be made here; the device says that it can".into(),
        (Err(MirrorReason::Refused(code)), None) => format!("no: refused with {:?}", vk::Result::from_raw(code)),
        (Err(reason), None) => format!("no: {reason:?}"),
    }
}

/// What the kernel counts as pinned while a sample is imported, less what it counted before.
fn pinned(manager: &Manager) -> Option<u64> {
    let count = || field("/proc/self/status", "VmPin:").map(|kib| kib * 1024);
    let kind = MappingKind::ALL.into_iter().find(|kind| kind.writable && kind.wish() == Path::Import)?;
    let sample = Sample::new(kind, SAMPLE).ok()?;
    let (before, object) = (count()?, register(manager, &sample).ok()?);
    let _lease = manager.acquire_timeout(&[&object], PATIENCE).ok()?;
    Some(count()?.saturating_sub(before))
}

fn extensions(gpu: &Gpu) -> Result<Vec<Extension>> {
    // SAFETY: the physical device comes from this instance.
    let listed = unsafe { gpu.instance.enumerate_device_extension_properties(gpu.physical) }?;
    let has = |name: &std::ffi::CStr| listed.iter().any(|listed| listed.extension_name_as_c_str() == Ok(name));
    let extension = |(name, purpose): (&std::ffi::CStr, &'static str)| Extension {
        name: name.to_string_lossy().into_owned(),
        purpose,
        present: has(name),
    };
    Ok(EXTENSIONS.into_iter().map(extension).collect())
}

fn max_allocation_size(gpu: &Gpu) -> u64 {
    let mut maintenance = vk::PhysicalDeviceMaintenance3Properties::default();
    let mut properties = vk::PhysicalDeviceProperties2::default().push_next(&mut maintenance);
    // SAFETY: the physical device comes from this instance, and knows the structure since Vulkan 1.1.
    unsafe { gpu.instance.get_physical_device_properties2(gpu.physical, &mut properties) };
    maintenance.max_memory_allocation_size
}

fn families(gpu: &Gpu) -> Vec<Family> {
    use vk::QueueFlags as Flags;
    let names = [
        (Flags::GRAPHICS, "graphics"),
        (Flags::COMPUTE, "compute"),
        (Flags::TRANSFER, "transfer"),
        (Flags::SPARSE_BINDING, "sparse"),
    ];
    // SAFETY: the physical device comes from this instance.
    let families = unsafe { gpu.instance.get_physical_device_queue_family_properties(gpu.physical) };
    let does = |flags: Flags| -> Vec<_> {
        names.iter().filter(|(flag, _)| flags.contains(*flag)).map(|(_, name)| *name).collect()
    };
    families
        .iter()
        .map(|family| Family { queues: family.queue_count, does: does(family.queue_flags).join(", ") })
        .collect()
}

fn memory_types(gpu: &Gpu) -> Vec<MemoryType> {
    use vk::MemoryPropertyFlags as Flags;
    let names = [
        (Flags::DEVICE_LOCAL, "device-local"),
        (Flags::HOST_VISIBLE, "host-visible"),
        (Flags::HOST_COHERENT, "coherent"),
        (Flags::HOST_CACHED, "cached"),
        (Flags::LAZILY_ALLOCATED, "lazy"),
        (Flags::PROTECTED, "protected"),
    ];
    let text = |flags: Flags| -> Vec<_> {
        names.iter().filter(|(flag, _)| flags.contains(*flag)).map(|(_, name)| *name).collect()
    };
    let types = gpu.memory.memory_types_as_slice().iter();
    types.map(|kind| MemoryType { heap: kind.heap_index, flags: text(kind.property_flags).join(", ") }).collect()
}

fn heaps(gpu: &Gpu) -> Vec<Heap> {
    let told = gpu.extensions.contains(&ext::memory_budget::NAME);
    let mut budget = vk::PhysicalDeviceMemoryBudgetPropertiesEXT::default();
    let mut properties = vk::PhysicalDeviceMemoryProperties2::default();
    if told {
        properties = properties.push_next(&mut budget);
    }
    // SAFETY: the physical device comes from this instance, and has the extension if its structure is chained.
    unsafe { gpu.instance.get_physical_device_memory_properties2(gpu.physical, &mut properties) };
    let heaps = gpu.memory.memory_heaps_as_slice().iter().enumerate();
    let heap = |(n, heap): (usize, &vk::MemoryHeap)| Heap {
        size: heap.size,
        device_local: heap.flags.contains(vk::MemoryHeapFlags::DEVICE_LOCAL),
        budget: told.then(|| budget.heap_budget[n]),
        used: told.then(|| budget.heap_usage[n]),
    };
    heaps.map(heap).collect()
}
