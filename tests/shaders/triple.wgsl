// out[i] = in[i] * 3 + added[0], as far as the shorter of the two reaches.

struct Words {
    first: vec4u,
}

@group(0) @binding(0) var<storage, read> from_words: array<u32>;
@group(0) @binding(1) var<uniform> added: Words;
@group(0) @binding(2) var<storage, read_write> to_words: array<u32>;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3u) {
    if id.x < min(arrayLength(&from_words), arrayLength(&to_words)) {
        to_words[id.x] = from_words[id.x] * 3u + added.first.x;
    }
}
