//! A small binary glTF file, built byte by byte so that a test can break any part of it.

use serde_json::{Value, json};

/// JSON and binary chunk of a file to be.
#[derive(Debug, Clone)]
pub(crate) struct Model {
    pub(crate) json: Value,
    pub(crate) binary: Vec<u8>,
}

/// Which form the cube's triangles are stored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Indices {
    U8,
    U16,
    U32,
    /// Every corner of every triangle is a vertex of its own.
    None,
}

impl Model {
    /// A cube from -1 to 1 in red. Accessors: 0 positions, 1 normals, 2 indices.
    pub(crate) fn cube(indices: Indices) -> Self {
        let (mut positions, mut normals, mut corners) = (Vec::new(), Vec::new(), Vec::new());
        for (axis, sign) in [(0, 1.0), (0, -1.0), (1, 1.0), (1, -1.0), (2, 1.0), (2, -1.0_f32)] {
            let first = u32::try_from(positions.len()).unwrap();
            for (u, v) in [(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0_f32)] {
                let (mut position, mut normal) = ([0.0; 3], [0.0; 3]);
                // (axis, axis + 1, axis + 2) is right-handed, so the corners run counterclockwise seen from outside.
                position[axis] = sign;
                position[(axis + 1) % 3] = u * sign;
                position[(axis + 2) % 3] = v;
                normal[axis] = sign;
                positions.push(position);
                normals.push(normal);
            }
            corners.extend([0, 1, 2, 0, 2, 3].map(|corner| first + corner));
        }
        if indices == Indices::None {
            positions = corners.iter().map(|&i| positions[i as usize]).collect();
            normals = corners.iter().map(|&i| normals[i as usize]).collect();
        }
        let floats = |v: &[[f32; 3]]| v.as_flattened().iter().flat_map(|f| f.to_le_bytes()).collect::<Vec<u8>>();
        let (positions_bytes, normals_bytes) = (floats(&positions), floats(&normals));
        let (kind, index_bytes): (u32, Vec<u8>) = match indices {
            Indices::U8 => (5121, corners.iter().map(|&i| u8::try_from(i).unwrap()).collect()),
            Indices::U16 => (5123, corners.iter().flat_map(|&i| u16::try_from(i).unwrap().to_le_bytes()).collect()),
            Indices::U32 | Indices::None => (5125, corners.iter().flat_map(|i| i.to_le_bytes()).collect()),
        };
        let (count, at_normals) = (positions.len(), positions_bytes.len());
        let at_indices = at_normals + normals_bytes.len();
        let binary = [positions_bytes, normals_bytes, index_bytes].concat();
        let mut json = json!({
            "asset": {"version": "2.0"},
            "scene": 0,
            "scenes": [{"nodes": [0]}],
            "nodes": [{"mesh": 0}],
            "meshes": [{"primitives": [{"attributes": {"POSITION": 0, "NORMAL": 1}, "indices": 2, "material": 0}]}],
            "materials": [{"pbrMetallicRoughness": {"baseColorFactor": [0.8, 0.05, 0.05, 1.0]}}],
            "accessors": [
                {"bufferView": 0, "componentType": 5126, "count": count, "type": "VEC3",
                 "min": [-1.0, -1.0, -1.0], "max": [1.0, 1.0, 1.0]},
                {"bufferView": 0, "byteOffset": at_normals, "componentType": 5126, "count": count, "type": "VEC3"},
                {"bufferView": 1, "componentType": kind, "count": 36, "type": "SCALAR"},
            ],
            "bufferViews": [
                {"buffer": 0, "byteLength": at_indices, "byteStride": 12},
                {"buffer": 0, "byteOffset": at_indices, "byteLength": binary.len() - at_indices},
            ],
            "buffers": [{"byteLength": binary.len()}],
        });
        if indices == Indices::None {
            json["meshes"][0]["primitives"][0].as_object_mut().unwrap().remove("indices");
        }
        Self { json, binary }
    }

    /// The same with one value of the JSON replaced; the path is in JSON pointer form.
    pub(crate) fn with(mut self, pointer: &str, value: Value) -> Self {
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        match self.json.pointer_mut(parent).unwrap() {
            Value::Array(items) => items[key.parse::<usize>().unwrap()] = value,
            other => other[key] = value,
        }
        self
    }

    /// The same with one value of the JSON taken out of its object.
    pub(crate) fn without(mut self, pointer: &str) -> Self {
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        self.json.pointer_mut(parent).unwrap().as_object_mut().unwrap().remove(key).unwrap();
        self
    }

    /// The file.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        container(self.json.to_string().as_bytes(), Some(&self.binary))
    }
}

/// A container of version 2 around a JSON chunk and maybe a binary one, both padded to four bytes.
pub(crate) fn container(json: &[u8], binary: Option<&[u8]>) -> Vec<u8> {
    let word = |n: usize| u32::try_from(n).unwrap().to_le_bytes();
    let pad = |bytes: &[u8], with: u8| {
        let mut bytes = bytes.to_vec();
        bytes.resize(bytes.len().next_multiple_of(4), with);
        bytes
    };
    let mut chunks = Vec::new();
    for (kind, bytes) in [(b"JSON", Some(pad(json, b' '))), (b"BIN\0", binary.map(|b| pad(b, 0)))] {
        if let Some(bytes) = bytes {
            chunks.extend([word(bytes.len()).as_slice(), kind, &bytes].concat());
        }
    }
    [b"glTF".as_slice(), &word(2), &word(12 + chunks.len()), &chunks].concat()
}
