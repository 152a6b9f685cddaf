//! Which processors belong together.

use std::{fs, num::NonZeroUsize, path::Path};

/// The NUMA nodes of a machine, each a list of processor numbers.
///
/// A pool has workers of its own for each node, which stay on its processors; work goes to the node of the thread that
/// submits it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topology {
    nodes: Box<[Box<[usize]>]>,
    /// How many workers compute at the same time, per node.
    parallel: Box<[u32]>,
}

impl Topology {
    /// All processors that this process may use, as one node.
    #[must_use]
    pub fn single() -> Self {
        let parallel = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        Self { nodes: Box::new([(0..parallel).collect()]), parallel: Box::new([parallel as u32]) }
    }

    /// What the kernel says about this machine; a single node if it says nothing.
    #[must_use]
    pub fn of_this_machine() -> Self {
        Self::read(Path::new("/sys/devices/system/node")).unwrap_or_else(Self::single)
    }

    /// Nodes as given, for tests and for machines that know better. Empty nodes are left out.
    #[must_use]
    pub fn from_nodes<N: AsRef<[usize]>>(nodes: impl IntoIterator<Item = N>) -> Self {
        let mut nodes: Vec<Box<[usize]>> = nodes.into_iter().map(|node| node.as_ref().into()).collect();
        nodes.retain(|node| !node.is_empty());
        if nodes.is_empty() {
            return Self::single();
        }
        let parallel = nodes.iter().map(|node| node.len() as u32).collect();
        Self { nodes: nodes.into(), parallel }
    }

    fn read(root: &Path) -> Option<Self> {
        let mut found = Vec::new();
        for entry in fs::read_dir(root).ok()?.flatten() {
            let name = entry.file_name();
            let Some(number) = name.to_str().and_then(|name| name.strip_prefix("node")) else { continue };
            let Ok(number) = number.parse::<u32>() else { continue };
            let list = fs::read_to_string(entry.path().join("cpulist")).ok()?;
            found.push((number, parse_list(&list)?));
        }
        found.retain(|(_, processors)| !processors.is_empty());
        found.sort_unstable_by_key(|&(number, _)| number);
        // With one node nothing is pinned, and what the process may use counts more than what the machine has.
        (found.len() > 1).then(|| Self::from_nodes(found.into_iter().map(|(_, processors)| processors)))
    }

    /// How many nodes there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Never: there is always at least one node.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// The processors of one node.
    #[must_use]
    pub fn processors(&self, node: u32) -> &[usize] {
        &self.nodes[node as usize]
    }

    pub(crate) fn parallel(&self, node: u32) -> u32 {
        self.parallel[node as usize]
    }

    /// The node that the calling thread runs on at this moment.
    pub(crate) fn here(&self) -> u32 {
        if self.nodes.len() == 1 {
            return 0;
        }
        let processor = rustix::thread::sched_getcpu();
        let found = (0..).zip(&self.nodes).find(|(_, node)| node.contains(&processor));
        found.map_or(0, |(node, _)| node)
    }
}

/// Reads the kernel's list format, `0-3,8,10-11`.
fn parse_list(list: &str) -> Option<Vec<usize>> {
    let mut processors = Vec::new();
    for part in list.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        processors.extend(first.parse::<usize>().ok()?..=last.parse().ok()?);
    }
    Some(processors)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_list_format_is_read() {
        assert_eq!(parse_list("0-2,5,7-8\n"), Some(vec![0, 1, 2, 5, 7, 8]));
        assert_eq!(parse_list("\n"), Some(vec![]));
        assert_eq!(parse_list("0-x"), None);
    }
}
