//! What there is to draw: the triangles of the default scene, each with its place in the world and its place in the file.

use glam::{DMat4, DQuat, DVec3};
use gltf::json;
use json::accessor::Type;
use json::mesh::{Mode, Primitive, Semantic};
use json::validation::Checked;

use crate::glb::{Array, Glb, GlbError, Span};

/// More draws than this are a mistake of the file: a few nodes that repeat a mesh of very many parts can ask for billions.
const MOST_DRAWS: usize = 1 << 20;

/// How vertices make triangles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Topology {
    /// Each three make one.
    List,
    /// Each one makes one with the two before it.
    Strip,
    /// Each one makes one with the one before it and the first.
    Fan,
}

/// One part of a mesh at one place of the world.
#[derive(Debug, Clone)]
pub struct Draw {
    /// Positions, three floats each.
    pub positions: Array,
    /// Normals, three floats each. Without them the triangles are shaded flat.
    pub normals: Option<Array>,
    /// Which vertices, of 1, 2 or 4 bytes each. Without them all, in order.
    pub indices: Option<Array>,
    /// How they make triangles.
    pub topology: Topology,
    /// Whether the back of a triangle is seen.
    pub double_sided: bool,
    /// The material's base colour, linear.
    pub colour: [f32; 3],
    /// From the mesh to the world.
    pub world: DMat4,
    /// The corners of the box around the positions, in the mesh's coordinates, as the file says.
    pub bounds: [DVec3; 2],
}

impl Draw {
    /// The eight corners of its box, in the world.
    pub fn corners(&self) -> impl Iterator<Item = DVec3> + '_ {
        let [low, high] = self.bounds;
        (0..8).map(move |i| {
            let pick = |bit: u32, low: f64, high: f64| if i & bit == 0 { low } else { high };
            self.world.transform_point3(DVec3::new(
                pick(1, low.x, high.x),
                pick(2, low.y, high.y),
                pick(4, low.z, high.z),
            ))
        })
    }

    /// How many triangles it has.
    #[must_use]
    pub fn triangles(&self) -> u64 {
        let vertices = u64::from(self.indices.map_or(self.positions.count, |indices| indices.count));
        match self.topology {
            Topology::List => vertices / 3,
            Topology::Strip | Topology::Fan => vertices.saturating_sub(2),
        }
    }
}

/// The default scene of a file.
#[derive(Debug, Default)]
pub struct Scene {
    /// What to draw, in the order of the file.
    pub draws: Vec<Draw>,
    /// Parts of meshes that are points or lines, which aren't drawn.
    pub skipped: usize,
    /// Draws whose base colour is a texture, of which only the factor is used.
    pub textured: usize,
}

impl Scene {
    /// Walks the nodes of the file's default scene.
    ///
    /// # Errors
    /// [`GlbError`] if something it needs is missing or wrong, or if nothing is left to draw.
    pub fn load(glb: &Glb) -> Result<Self, GlbError> {
        let root = &glb.root;
        let index = root.scene.map_or(0, |index| index.value());
        let scene = root.scenes.get(index).ok_or_else(|| dangling("the file", "scene", index))?;

        let mut result = Self::default();
        let mut seen = vec![false; root.nodes.len()];
        let mut open: Vec<_> = scene.nodes.iter().rev().map(|node| (node.value(), DMat4::IDENTITY)).collect();
        while let Some((index, parent)) = open.pop() {
            let node = root.nodes.get(index).ok_or_else(|| dangling("the scene", "node", index))?;
            if std::mem::replace(&mut seen[index], true) {
                return Err(GlbError::Scene(format!("its nodes are no tree: node {index} is reached twice")));
            }
            let world = parent * local(node);
            if let Some(mesh) = node.mesh {
                result.add_mesh(glb, mesh.value(), world, index)?;
            }
            open.extend(node.children.iter().flatten().rev().map(|child| (child.value(), world)));
        }
        if result.draws.is_empty() {
            return Err(GlbError::Scene("its scene has no triangles".into()));
        }
        Ok(result)
    }

    fn add_mesh(&mut self, glb: &Glb, index: usize, world: DMat4, node: usize) -> Result<(), GlbError> {
        if !world.is_finite() {
            return Err(GlbError::Scene(format!("the matrix of node {node} is not finite")));
        }
        let mesh = glb.root.meshes.get(index).ok_or_else(|| dangling("a node", "mesh", index))?;
        for primitive in &mesh.primitives {
            let topology = match primitive.mode {
                Checked::Valid(Mode::Triangles) => Topology::List,
                Checked::Valid(Mode::TriangleStrip) => Topology::Strip,
                Checked::Valid(Mode::TriangleFan) => Topology::Fan,
                _ => {
                    self.skipped += 1;
                    continue;
                }
            };
            if self.draws.len() == MOST_DRAWS {
                return Err(GlbError::Scene(format!("its scene has more than {MOST_DRAWS} parts")));
            }
            let draw = self.part(glb, primitive, topology, world)?;
            self.draws.push(draw);
        }
        Ok(())
    }

    fn part(&mut self, glb: &Glb, primitive: &Primitive, topology: Topology, world: DMat4) -> Result<Draw, GlbError> {
        let attribute = |semantic| primitive.attributes.get(&Checked::Valid(semantic)).map(json::Index::value);
        let Some(position) = attribute(Semantic::Positions) else {
            return Err(GlbError::Scene("a part of a mesh has no positions".into()));
        };
        let positions = glb.array(position, "positions", Type::Vec3)?;
        let normal = attribute(Semantic::Normals);
        let normals = normal.map(|index| glb.array(index, "normals", Type::Vec3)).transpose()?;
        if let (Some(index), Some(normals)) = (normal, normals)
            && normals.count != positions.count
        {
            let why = format!("has {} elements for {} positions", normals.count, positions.count);
            return Err(GlbError::Accessor { index, role: "normals", why });
        }
        let index = primitive.indices.map(|index| index.value());
        let indices = index.map(|index| glb.array(index, "indices", Type::Scalar)).transpose()?;
        if let (Some(index), Some(indices)) = (index, indices)
            && indices.stride != indices.component
        {
            let why = format!("has a stride of {} bytes; indices are packed", indices.stride);
            return Err(GlbError::Accessor { index, role: "indices", why });
        }

        let mut material = json::Material::default();
        if let Some(index) = primitive.material {
            let found = glb.root.materials.get(index.value());
            material = found.ok_or_else(|| dangling("a mesh", "material", index.value()))?.clone();
        }
        let pbr = &material.pbr_metallic_roughness;
        self.textured += usize::from(pbr.base_color_texture.is_some());
        let [r, g, b, _] = pbr.base_color_factor.0;
        Ok(Draw {
            positions,
            normals,
            indices,
            topology,
            double_sided: material.double_sided,
            colour: [r, g, b].map(|c| if c.is_finite() { c.clamp(0.0, 1.0) } else { 0.0 }),
            world,
            bounds: bounds(glb, position)?,
        })
    }

    /// How many triangles a frame has.
    #[must_use]
    pub fn triangles(&self) -> u64 {
        self.draws.iter().map(Draw::triangles).sum()
    }

    /// The bytes of the file that the draws name, each once, as ascending spans with gaps between them.
    #[must_use]
    pub fn named_spans(&self) -> Vec<Span> {
        let arrays = self.draws.iter().flat_map(|draw| [Some(draw.positions), draw.normals, draw.indices]);
        let mut spans: Vec<_> = arrays.flatten().map(|array| Span { start: array.offset, len: array.bytes }).collect();
        spans.sort_unstable_by_key(|span| span.start);
        let mut merged: Vec<Span> = Vec::new();
        for span in spans {
            match merged.last_mut() {
                Some(last) if span.start <= last.end() => last.len = last.end().max(span.end()) - last.start,
                _ => merged.push(span),
            }
        }
        merged
    }

    /// How many bytes of the file the draws name.
    #[must_use]
    pub fn named_bytes(&self) -> u64 {
        self.named_spans().iter().map(|span| span.len).sum()
    }
}

/// The node's own transform.
fn local(node: &json::Node) -> DMat4 {
    if let Some(matrix) = node.matrix {
        return DMat4::from_cols_array(&matrix.map(f64::from));
    }
    let vector = |v: Option<[f32; 3]>, or: f64| v.map_or(DVec3::splat(or), |v| DVec3::from(v.map(f64::from)));
    let rotation = DQuat::from_array(node.rotation.unwrap_or_default().0.map(f64::from));
    let rotation = if rotation.length_squared() > 0.0 { rotation.normalize() } else { DQuat::IDENTITY };
    DMat4::from_scale_rotation_translation(vector(node.scale, 1.0), rotation, vector(node.translation, 0.0))
}

/// The smallest and largest position, which the format requires the file to say.
fn bounds(glb: &Glb, index: usize) -> Result<[DVec3; 2], GlbError> {
    let wrong = |why: &str| GlbError::Accessor { index, role: "positions", why: why.into() };
    let accessor = glb.root.accessors.get(index).ok_or_else(|| dangling("a mesh", "accessor", index))?;
    let corner = |value: &Option<json::Value>| {
        let numbers: [f64; 3] = json::deserialize::from_value(value.clone()?).ok()?;
        Some(DVec3::from(numbers)).filter(|v| v.is_finite())
    };
    let (Some(low), Some(high)) = (corner(&accessor.min), corner(&accessor.max)) else {
        return Err(wrong("doesn't say its smallest and largest value, which the camera needs"));
    };
    if low.cmpgt(high).any() {
        return Err(wrong("has a smallest value above its largest"));
    }
    Ok([low, high])
}

fn dangling(from: &str, to: &'static str, index: usize) -> GlbError {
    GlbError::Dangling { from: from.into(), to, index }
}
