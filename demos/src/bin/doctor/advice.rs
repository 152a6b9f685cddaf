//! What follows from the figures, in words.

use crate::device::{Device, SAMPLE};
use crate::kernel::Kernel;
use crate::text::bytes;

pub(crate) fn advice(kernel: &Kernel, devices: &[Device]) -> Vec<String> {
    let mut all = Vec::new();
    of_kernel(kernel, &mut all);
    for device in devices {
        of_device(device, &mut all);
    }
    all
}

fn of_kernel(kernel: &Kernel, all: &mut Vec<String>) {
    let watch = &kernel.userfaultfd;
    if !watch.usable {
        all.push("The kernel lets nobody watch memory here (userfaultfd): no munmap is noticed. Announce each with `Manager::mutate`, or allow the system call in the sandbox.".into());
    } else if !watch.events {
        all.push("This kernel tells of faults and not of munmap: announce each change of registered memory with `Manager::mutate`.".into());
    } else if !watch.shared_memory {
        all.push(
            "Shared memory can't be watched before Linux 5.19: announce its changes with `Manager::mutate`.".into(),
        );
    } else if !watch.files {
        all.push(
            "Mapped files can't be watched before Linux 6.7: announce their changes with `Manager::mutate`.".into(),
        );
    }
    if let Some(most) = kernel.max_map_count.filter(|&most| most <= 65_530) {
        all.push(format!("Each watched range inside a larger mapping takes up to two more of the {most} mappings a process may have. With tens of thousands of scattered objects: sysctl vm.max_map_count=1048576."));
    }
}

fn of_device(device: &Device, all: &mut Vec<String>) {
    let name = &device.name;
    let Some(found) = &device.found else {
        all.push(format!("{name} can't be used: {}.", device.error.as_deref().unwrap_or("no reason is known")));
        return;
    };
    if let Some(force) = &found.forced {
        all.push(format!(
            "PINFOLD_FORCE makes everything go the way `{force}` on {name}; unset it to let the device decide."
        ));
    }
    if !found.extensions[0].present {
        all.push(format!("{name} can't import host memory: everything is copied, and objects that the GPU writes can't be acquired. A newer driver may have VK_EXT_external_memory_host."));
    }
    if device.kind == "CPU driver" {
        all.push(format!("{name} is a program on the CPU, and reads private memory through this process's page tables: unmapping private memory under running work crashes the process. Use shared memory (a memfd, `HostBuffer`), `Manager::mutate`, or unregister first."));
    }
    let refused: Vec<_> = found.memory.iter().filter(|row| row.mirrored).map(|row| row.memory.as_str()).collect();
    if !refused.is_empty() && found.extensions[0].present && found.forced.is_none() {
        all.push(format!(
            "{name} doesn't take {}: it is copied. Memory of another kind is taken in place.",
            refused.join(", ")
        ));
    }
    let slow = found.memory.iter().filter(|row| !row.mirrored && row.acquire_us > row.copy_us);
    let slow: Vec<_> = slow.map(|row| row.memory.as_str()).collect();
    if !slow.is_empty() {
        all.push(format!("On {name}, taking {} of {} was dearer than copying it once: it pays for memory that is used more than a few times.", bytes(SAMPLE as u64), slow.join(", ")));
    }
    let range = u64::from(found.limits.max_storage_buffer_range);
    if range < found.limits.chunk_size {
        all.push(format!(
            "A shader of {name} sees at most {} through one storage binding: bind larger objects in parts.",
            bytes(range)
        ));
    }
    if found.heaps.iter().any(|heap| heap.budget.is_none()) {
        all.push(format!(
            "{name} doesn't tell how much memory is left (VK_EXT_memory_budget): set `Config::budget` if you know."
        ));
    }
    if found.validation_messages.is_some_and(|count| count > 0) {
        all.push(format!("The validation layer had something to say about what was done on {name}; see above."));
    }
}
