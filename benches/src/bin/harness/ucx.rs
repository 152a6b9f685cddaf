//! UCX's registration cache, the one that high-performance computing uses today, if Debian's `libucx0` is installed.
//!
//! **Problem.** The cache hears of unmapping by patching the C library of its process: every `munmap` and `madvise` costs more from then on. Measured in this
//! process it would be in every figure that follows.
//!
//! **Law.** UCX lives in a child process, this program started anew, which takes a sample when it is asked for one. So it takes turns with the others and
//! leaves nothing behind.
//!
//! **Protocol.** The parent writes a line, `hit 1000`, and the child answers with a line, a number; or it ends, and the last line says why.

use std::ffi::{CStr, c_char, c_int, c_uint, c_ulong, c_void};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::ptr;

use anyhow::{Context, Result, bail, ensure};
use libloading::{Library, Symbol};
use pinfold_vulkan::page_size;

use crate::clock::{cpu, microseconds};
use crate::memory::Memory;
use crate::stats::Random;

/// The hidden argument that makes this program the child.
pub(crate) const ARGUMENT: &str = "--be-the-ucx-child";
/// The structure below is that of this version; others are laid out differently.
const KNOWN: (c_uint, c_uint) = (1, 13);

/// `ucs_rcache_params_t` of UCX 1.13.
#[repr(C)]
struct Parameters {
    region_struct_size: usize,
    alignment: usize,
    max_alignment: usize,
    ucm_events: c_int,
    ucm_event_priority: c_int,
    ops: *const Operations,
    context: *mut c_void,
    flags: c_int,
    max_regions: c_ulong,
    max_size: usize,
    max_unreleased: usize,
}

type Region = c_void;
type Cache = c_void;

/// `ucs_rcache_ops_t`.
#[repr(C)]
struct Operations {
    mem_reg: extern "C" fn(*mut c_void, *mut Cache, *mut c_void, *mut Region, u16) -> i8,
    mem_dereg: extern "C" fn(*mut c_void, *mut Cache, *mut Region),
    dump_region: extern "C" fn(*mut c_void, *mut Cache, *mut Region, *mut c_char, usize),
}

extern "C" fn register(_: *mut c_void, _: *mut Cache, _: *mut c_void, _: *mut Region, _: u16) -> i8 {
    0
}

extern "C" fn deregister(_: *mut c_void, _: *mut Cache, _: *mut Region) {}

extern "C" fn dump(_: *mut c_void, _: *mut Cache, _: *mut Region, buffer: *mut c_char, room: usize) {
    if room > 0 {
        // SAFETY: the library gives a buffer with this much room.
        unsafe { buffer.write(0) };
    }
}

static OPERATIONS: Operations = Operations { mem_reg: register, mem_dereg: deregister, dump_region: dump };

/// `UCM_EVENT_VM_UNMAPPED`
const UNMAPPED: c_int = 1 << 17;
/// `UCS_RCACHE_FLAG_NO_PFN_CHECK`
const NO_CHECK: c_int = 1;
/// More than `ucs_rcache_region_t` has: 80 bytes.
const REGION: usize = 256;

type Create = unsafe extern "C" fn(*const Parameters, *const c_char, *mut c_void, *mut *mut Cache) -> i8;
type Get = unsafe extern "C" fn(*mut Cache, *mut c_void, usize, c_int, *mut c_void, *mut *mut Region) -> i8;
type Put = unsafe extern "C" fn(*mut Cache, *mut Region);

/// A cache whose registrations cost nothing, so that what is measured is the cache.
struct Rcache {
    get: Get,
    put: Put,
    cache: *mut Cache,
}

impl Rcache {
    fn new() -> Result<Self> {
        // SAFETY: the libraries' initialisers may do what they like to this process: it is the child.
        let ucp = unsafe { Library::new("libucp.so.0") }.context("Debian's libucx0 is not installed")?;
        // SAFETY: the function has this signature in every version.
        let version: Symbol<'_, unsafe extern "C" fn(*mut c_uint, *mut c_uint, *mut c_uint)> =
            unsafe { ucp.get(b"ucp_get_version") }?;
        let (mut major, mut minor, mut release) = (0, 0, 0);
        // SAFETY: three live integers, which the call writes.
        unsafe { version(&raw mut major, &raw mut minor, &raw mut release) };
        ensure!(
            (major, minor) == KNOWN,
            "UCX is {major}.{minor}, and only the layout of {}.{} is known here",
            KNOWN.0,
            KNOWN.1
        );
        // SAFETY: as for the first library.
        let ucs = unsafe { Library::new("libucs.so.0") }.context("libucs is missing beside libucp")?;
        // SAFETY: of version 1.13, which it is, these three functions have these signatures.
        let create: Create = *unsafe { ucs.get::<Create>(b"ucs_rcache_create") }?;
        // SAFETY: as above.
        let get: Get = *unsafe { ucs.get::<Get>(b"ucs_rcache_get") }?;
        // SAFETY: as above.
        let put: Put = *unsafe { ucs.get::<Put>(b"ucs_rcache_region_put") }?;
        // The functions are used until the process ends.
        std::mem::forget((ucp, ucs));
        let parameters = Parameters {
            region_struct_size: REGION,
            alignment: page_size(),
            max_alignment: page_size(),
            ucm_events: UNMAPPED,
            ucm_event_priority: 1000,
            ops: &raw const OPERATIONS,
            context: ptr::null_mut(),
            flags: NO_CHECK,
            max_regions: c_ulong::MAX,
            max_size: usize::MAX,
            max_unreleased: usize::MAX,
        };
        let mut cache = ptr::null_mut();
        let name: &CStr = c"harness";
        // SAFETY: the parameters are complete, and what they point to is static.
        let status = unsafe { create(&raw const parameters, name.as_ptr(), ptr::null_mut(), &raw mut cache) };
        ensure!(status == 0 && !cache.is_null(), "ucs_rcache_create answers {status}");
        Ok(Self { get, put, cache })
    }

    /// Finds or registers a page, and lets go of it.
    fn use_page(&self, page: usize) {
        let mut region = ptr::null_mut();
        let both = libc::PROT_READ | libc::PROT_WRITE;
        let address = ptr::without_provenance_mut(page);
        // SAFETY: the cache is alive; the address is only looked up; `region` is written.
        let status = unsafe { (self.get)(self.cache, address, page_size(), both, ptr::null_mut(), &raw mut region) };
        assert_eq!(status, 0, "the cache takes every page");
        // SAFETY: the region that was just got, once.
        unsafe { (self.put)(self.cache, region) };
    }
}

/// What the child does until it is told nothing more.
pub(crate) fn child() -> Result<()> {
    let cache = match Rcache::new() {
        Ok(cache) => cache,
        Err(error) => {
            println!("absent {error:#}");
            return Ok(());
        }
    };
    println!("ready");
    let mut held: Option<(usize, Memory)> = None;
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let (what, count) = line.split_once(' ').context("a question has two words")?;
        let count: usize = count.parse()?;
        // Every second page, as neighbours would be merged.
        let page = |memory: &Memory, index: usize| memory.part(2 * index, page_size()).start();
        let value = match what {
            "hit" => {
                if held.as_ref().is_none_or(|(of, _)| *of != count) {
                    let memory = Memory::untouched(2 * count * page_size())?;
                    (0..count).for_each(|index| cache.use_page(page(&memory, index)));
                    held = Some((count, memory));
                }
                let memory = &held.as_ref().expect("just made").1;
                let mut random = Random::new(6);
                let asked: Vec<_> = (0..1 << 14).map(|_| page(memory, random.below(count))).collect();
                let mut next = asked.iter();
                cpu(asked.len(), || next.next().into_iter().for_each(|&page| cache.use_page(page)))
            }
            "miss" => {
                let memory = Memory::untouched(2 * count * page_size())?;
                let mut index = 0;
                cpu(count, || {
                    cache.use_page(page(&memory, index));
                    index += 1;
                })
            }
            "mass" => {
                let memory = Memory::populated(2 * count * page_size())?;
                (0..count).for_each(|index| cache.use_page(page(&memory, index)));
                let begun = std::time::Instant::now();
                memory.unmap();
                let time = microseconds(begun.elapsed());
                cache.use_page(page(&Memory::untouched(page_size())?, 0));
                time
            }
            _ => bail!("nobody knows {what}"),
        };
        println!("{value}");
    }
    Ok(())
}

/// The parent's end of it. The child ends when this is dropped, as its input does.
pub(crate) struct Ucx {
    child: Child,
    to: Option<ChildStdin>,
    from: BufReader<ChildStdout>,
}

impl Ucx {
    /// Starts the child.
    ///
    /// # Errors
    /// Why there is no UCX here.
    pub(crate) fn start() -> Result<Self> {
        let program = std::env::current_exe()?;
        let mut command = Command::new(program);
        command.arg(ARGUMENT).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn()?;
        let (to, from) = (child.stdin.take(), child.stdout.take().context("the child's output")?);
        let mut started = Self { child, to, from: BufReader::new(from) };
        match started.line()?.trim() {
            "ready" => Ok(started),
            other => {
                bail!("{}", other.strip_prefix("absent ").unwrap_or("the library ended the process that loaded it"))
            }
        }
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.from.read_line(&mut line)?;
        Ok(line)
    }

    /// A sample.
    pub(crate) fn ask(&mut self, what: &str, count: usize) -> Result<f64> {
        let to = self.to.as_mut().context("the child's input is open until the end")?;
        writeln!(to, "{what} {count}")?;
        to.flush()?;
        let answer = self.line()?;
        answer.trim().parse().with_context(|| format!("UCX ended while it was asked for {what} {count}"))
    }
}

impl Drop for Ucx {
    fn drop(&mut self) {
        drop(self.to.take());
        let _ = self.child.wait();
    }
}
