//! Opens a binary glTF file whose vertices nobody but the GPU will read.
//!
//! The file may be truncated by somebody else at any moment, and touching a mapped page that the file no longer has is a SIGBUS.
//! So the mapping isn't touched at all: header and JSON come by `pread`, which answers a short read instead, and of the binary chunk
//! only the place is noted. Where the bytes of an accessor lie is arithmetic on numbers from the file, all of it checked.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use gltf::json;
use json::accessor::{Accessor, ComponentType, Type};
use json::validation::Checked;
use thiserror::Error;

/// The most bytes of JSON that are read: two hundred times what the largest scenes of the sample collections have.
const JSON_LIMIT: u32 = 256 << 20;

/// The container's header, and the header of each chunk.
const HEADER: u64 = 12;
const CHUNK_HEADER: u64 = 8;

/// Extensions a file may require without changing where its triangles are: they add to materials, lights and textures.
const HARMLESS: [&str; 5] = ["KHR_materials_", "KHR_texture_", "KHR_lights_", "EXT_texture_", "KHR_xmp"];

/// What is wrong with a file.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum GlbError {
    /// A system call failed.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// Not a regular file.
    #[error("it is a {0}, not a regular file")]
    NotAFile(&'static str),
    /// No bytes.
    #[error("it is empty (0 bytes)")]
    Empty,
    /// A JSON document.
    #[error(
        "it is a text glTF file; only the binary form (.glb) can be drawn in place, and most exporters can write it"
    )]
    Text,
    /// Something else.
    #[error("it is not a GLB file: it begins with {0:02x?}, not with \"glTF\"")]
    NotGlb([u8; 4]),
    /// Another version of the container.
    #[error("it is a GLB file of version {0}; only version 2 is read")]
    Version(u32),
    /// The file ends early.
    #[error("it is truncated: {what} ends at byte {end}, and the file has {len} bytes")]
    Truncated {
        /// What is cut off.
        what: &'static str,
        /// Where it should end.
        end: u64,
        /// How long the file is.
        len: u64,
    },
    /// The chunks aren't what the format wants.
    #[error("its chunks are wrong: {0}")]
    Chunks(&'static str),
    /// Too much JSON.
    #[error("its JSON chunk has {0} bytes; more than {JSON_LIMIT} are not read")]
    JsonTooBig(u32),
    /// The JSON can't be parsed.
    #[error("its JSON chunk can't be read: {0}")]
    Json(#[from] json::Error),
    /// It needs something that can't be drawn in place.
    #[error("it requires the extension {name}{}", .hint.map(|hint| format!(": {hint}")).unwrap_or_default())]
    Extension {
        /// The extension's name.
        name: String,
        /// Why that is a problem.
        hint: Option<&'static str>,
    },
    /// An index leads nowhere.
    #[error("{from} names {to} {index}, which does not exist")]
    Dangling {
        /// Who names it.
        from: String,
        /// What kind of thing.
        to: &'static str,
        /// Which.
        index: usize,
    },
    /// An accessor can't be used as it is.
    #[error("accessor {index} ({role}) {why}")]
    Accessor {
        /// Which.
        index: usize,
        /// What it is used for.
        role: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// The scene is broken.
    #[error("{0}")]
    Scene(String),
}

/// Bytes of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Offset of the first byte in the file.
    pub start: u64,
    /// Number of bytes.
    pub len: u64,
}

impl Span {
    /// One past the last byte.
    #[must_use]
    pub const fn end(self) -> u64 {
        self.start + self.len
    }
}

/// An array of elements in the file, checked to lie in the binary chunk and to be aligned for the GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Array {
    /// Offset of the first element in the file.
    pub offset: u64,
    /// Number of elements; never 0.
    pub count: u32,
    /// Bytes from one element to the next.
    pub stride: u32,
    /// Bytes of one component: 1, 2 or 4.
    pub component: u32,
    /// Bytes from the first to the last that belongs to an element.
    pub bytes: u64,
}

/// An open file, its JSON, and the place of its binary chunk.
#[derive(Debug)]
pub struct Glb {
    /// The file, open for reading.
    pub file: File,
    /// Its length when it was opened.
    pub len: u64,
    /// The binary chunk.
    pub binary: Span,
    /// The document. Its indices aren't checked.
    pub root: json::Root,
}

impl Glb {
    /// Opens `path` and reads all but the binary chunk.
    ///
    /// # Errors
    /// [`GlbError`]; the text doesn't name the file, which the caller knows.
    pub fn open(path: &Path) -> Result<Self, GlbError> {
        // Opening a pipe would wait for a writer without O_NONBLOCK; regular files don't know it.
        let file = File::options().read(true).custom_flags(nix::libc::O_NONBLOCK).open(path)?;
        let meta = file.metadata()?;
        if meta.is_dir() {
            return Err(GlbError::NotAFile("directory"));
        }
        if !meta.is_file() {
            return Err(GlbError::NotAFile("device, pipe or socket"));
        }
        let len = meta.len();
        let (json, binary) = read_chunks(&file, len)?;
        let padding = json.iter().rev().take_while(|&&byte| byte == 0).count();
        // Padding is to be spaces; some exporters write zeros.
        let root = json::Root::from_slice(&json[..json.len() - padding])?;
        refuse_extensions(&root)?;
        Ok(Self { file, len, binary, root })
    }

    /// Where an accessor of `components` (1 for scalars, 3 for vectors) has its bytes. `role` is for messages.
    ///
    /// # Errors
    /// [`GlbError::Accessor`] and [`GlbError::Dangling`].
    pub fn array(&self, index: usize, role: &'static str, kind: Type) -> Result<Array, GlbError> {
        let wrong = |why: String| GlbError::Accessor { index, role, why };
        let dangling = |from, to, index| GlbError::Dangling { from, to, index };
        let accessor =
            self.root.accessors.get(index).ok_or_else(|| dangling(format!("a {role}"), "accessor", index))?;
        let component = component(accessor, kind).map_err(wrong)?;
        if accessor.sparse.is_some() {
            return Err(wrong("is sparse: its values are to be patched, which needs a copy".into()));
        }
        let view = accessor.buffer_view.ok_or_else(|| wrong("has no buffer view".into()))?.value();
        let view_json = self.root.buffer_views.get(view);
        let view_json = view_json.ok_or_else(|| dangling(format!("accessor {index}"), "buffer view", view))?;
        if let Some(name) = view_json.extensions.as_ref().and_then(|e| e.others.keys().next()) {
            return Err(wrong(format!("lies in buffer view {view}, which is stored with the extension {name}")));
        }
        let buffer = self.buffer(view_json.buffer.value(), view).map_err(wrong)?;

        let view_start = view_json.byte_offset.map_or(0, |n| n.0);
        let view_end = view_start.checked_add(view_json.byte_length.0).filter(|&end| end <= buffer.len);
        let view_end = view_end.ok_or_else(|| {
            wrong(format!(
                "lies in buffer view {view}, bytes {view_start}+{} of a buffer of {}",
                view_json.byte_length.0, buffer.len
            ))
        })?;

        let element = component * u32::try_from(kind.multiplicity()).expect("at most 16");
        let stride = view_json.byte_stride.map_or(Ok(element), |stride| u32::try_from(stride.0));
        // A stride of 0 is how some exporters write "packed"; the format's own limit is 252.
        let stride = match stride.map_err(|_| wrong("has a stride over 32 bits".into()))? {
            0 => element,
            stride if stride < element || stride > 252 || !stride.is_multiple_of(component) => {
                return Err(wrong(format!("has a stride of {stride} bytes for elements of {element}")));
            }
            stride => stride,
        };
        let count = u32::try_from(accessor.count.0).ok().filter(|&count| count > 0);
        let count = count.ok_or_else(|| wrong(format!("has {} elements", accessor.count.0)))?;
        let bytes = u64::from(count - 1) * u64::from(stride) + u64::from(element);
        let inside = accessor.byte_offset.map_or(0, |n| n.0);
        let start = view_start.checked_add(inside);
        let start = start.filter(|start| start.checked_add(bytes).is_some_and(|end| end <= view_end));
        let start = start.ok_or_else(|| {
            wrong(format!(
                "reaches outside its buffer view: {bytes} bytes at {inside}, and the view has {}",
                view_json.byte_length.0
            ))
        })?;
        let offset = buffer.start + start;
        if !offset.is_multiple_of(u64::from(component)) {
            return Err(wrong(format!("begins at byte {offset} of the file, which is no multiple of {component}")));
        }
        Ok(Array { offset, count, stride, component, bytes })
    }

    /// The bytes of a buffer in the file.
    fn buffer(&self, index: usize, view: usize) -> Result<Span, String> {
        let Some(buffer) = self.root.buffers.get(index) else {
            return Err(format!("lies in buffer view {view} of buffer {index}, which does not exist"));
        };
        if let Some(uri) = &buffer.uri {
            let place = if uri.starts_with("data:") { "inside the JSON" } else { "in another file" };
            return Err(format!("lies in buffer {index}, whose bytes are {place} and not in the binary chunk"));
        }
        if index != 0 {
            return Err(format!("lies in buffer {index}; only buffer 0 can be the binary chunk"));
        }
        let len = buffer.byte_length.0;
        if len > self.binary.len {
            return Err(format!("lies in a buffer of {len} bytes, and the binary chunk has {}", self.binary.len));
        }
        Ok(Span { start: self.binary.start, len })
    }
}

/// Checks the container and returns the JSON and the place of the binary chunk.
fn read_chunks(file: &File, file_len: u64) -> Result<(Vec<u8>, Span), GlbError> {
    if file_len == 0 {
        return Err(GlbError::Empty);
    }
    let mut magic = [0; 4];
    read(file, &mut magic, 0, "the header", file_len)?;
    if magic.trim_ascii_start().first() == Some(&b'{') {
        return Err(GlbError::Text);
    }
    if magic != *b"glTF" {
        return Err(GlbError::NotGlb(magic));
    }
    let [version, len] = words(file, 4, "the header", file_len)?;
    if version != 2 {
        return Err(GlbError::Version(version));
    }
    let len = u64::from(len);
    if len > file_len {
        return Err(GlbError::Truncated { what: "the container", end: len, len: file_len });
    }

    let (mut json, mut at) = (None, HEADER);
    while at < len {
        let [chunk_len, kind] = words(file, at, "a chunk's header", len)?;
        let span = Span { start: at + CHUNK_HEADER, len: u64::from(chunk_len) };
        let what = match &kind.to_le_bytes() {
            b"JSON" => "the JSON chunk",
            b"BIN\0" => "the binary chunk",
            _ => "a chunk",
        };
        if span.end() > len {
            return Err(GlbError::Truncated { what, end: span.end(), len });
        }
        match (&kind.to_le_bytes(), json.is_some()) {
            (b"JSON", false) if chunk_len > JSON_LIMIT => return Err(GlbError::JsonTooBig(chunk_len)),
            (b"JSON", false) => {
                let mut bytes = vec![0; chunk_len as usize];
                read(file, &mut bytes, span.start, what, file_len)?;
                json = Some(bytes);
            }
            (b"JSON", true) => return Err(GlbError::Chunks("there are two JSON chunks")),
            (_, false) => return Err(GlbError::Chunks("the first one is not JSON")),
            (b"BIN\0", true) => return Ok((json.expect("matched as present"), span)),
            (_, true) => {} // The format says that unknown chunks are to be skipped.
        }
        at = span.end();
    }
    match json {
        Some(_) => Err(GlbError::Chunks("there is no binary chunk, so nothing that could be drawn in place")),
        None => Err(GlbError::Chunks("there is none")),
    }
}

/// Two little-endian words at `at`.
fn words(file: &File, at: u64, what: &'static str, len: u64) -> Result<[u32; 2], GlbError> {
    let mut bytes = [0; 8];
    read(file, &mut bytes, at, what, len)?;
    let [a, b, c, d, e, f, g, h] = bytes;
    Ok([u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h])])
}

/// Fills `into` from `at`, or says what is cut off.
fn read(file: &File, into: &mut [u8], at: u64, what: &'static str, len: u64) -> Result<(), GlbError> {
    let end = at + into.len() as u64;
    if end > len {
        return Err(GlbError::Truncated { what, end, len });
    }
    file.read_exact_at(into, at).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => GlbError::Truncated { what, end, len: at },
        _ => GlbError::Io(error),
    })
}

/// The bytes of one component, if the accessor holds elements of `kind` in a form the vertex fetch can read.
fn component(accessor: &Accessor, kind: Type) -> Result<u32, String> {
    let (Checked::Valid(found), Checked::Valid(component)) = (accessor.type_, accessor.component_type) else {
        return Err("has an unknown type".into());
    };
    let fits = match kind {
        Type::Scalar => matches!(component.0, ComponentType::U8 | ComponentType::U16 | ComponentType::U32),
        _ => component.0 == ComponentType::F32,
    };
    if found != kind || !fits {
        return Err(format!("holds {found:?} of {:?}, which is not what it is used for", component.0));
    }
    Ok(u32::try_from(component.0.size()).expect("at most 4"))
}

/// Refuses files that say they can't be understood without an extension that moves or packs vertices.
fn refuse_extensions(root: &json::Root) -> Result<(), GlbError> {
    let unknown = |name: &&String| !HARMLESS.iter().any(|harmless| name.starts_with(harmless));
    let Some(name) = root.extensions_required.iter().find(unknown) else { return Ok(()) };
    let hint = match name.as_str() {
        "KHR_draco_mesh_compression" | "EXT_meshopt_compression" | "KHR_meshopt_compression" => {
            Some("its vertices are compressed, so a GPU can't read them in place; save it without compression")
        }
        "KHR_mesh_quantization" => Some("its vertices are integers; only 32-bit floats are drawn"),
        _ => None,
    };
    Err(GlbError::Extension { name: name.clone(), hint })
}
