//! The order of eviction: an intrusive list over node numbers, least recently used first.
//!
//! Insertion at the end and removal from anywhere are O(1) and allocate nothing. Place 0 is the sentinel that closes
//! the ring, which is why node numbers start at 1.

use crate::ids::NodeId;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Link {
    previous: u32,
    next: u32,
}

/// A list of nodes in the order in which they became evictable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LruList {
    links: Vec<Link>,
    len: usize,
}

impl LruList {
    pub(crate) fn new() -> Self {
        Self {
            links: vec![Link::default()],
            len: 0,
        }
    }

    /// Makes room for one more node number. Amortised O(1).
    pub(crate) fn grow(&mut self) {
        self.links.push(Link::default());
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The least recently used node.
    pub(crate) fn first(&self) -> Option<NodeId> {
        NodeId::new(self.links[0].next)
    }

    /// The node after `node`.
    pub(crate) fn next(&self, node: NodeId) -> Option<NodeId> {
        NodeId::new(self.links[node.index()].next)
    }

    /// Appends a node that is not in the list.
    pub(crate) fn push(&mut self, node: NodeId) {
        let last = self.links[0].previous;
        self.links[node.index()] = Link {
            previous: last,
            next: 0,
        };
        self.links[last as usize].next = node.get();
        self.links[0].previous = node.get();
        self.len += 1;
    }

    /// Takes a node that is in the list out of it.
    pub(crate) fn remove(&mut self, node: NodeId) {
        let Link { previous, next } = self.links[node.index()];
        self.links[previous as usize].next = next;
        self.links[next as usize].previous = previous;
        self.links[node.index()] = Link::default();
        self.len -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn members(list: &LruList) -> Vec<u32> {
        std::iter::successors(list.first(), |&node| list.next(node))
            .map(NodeId::get)
            .collect()
    }

    #[test]
    fn keeps_the_order_through_removals() {
        let mut list = LruList::new();
        let nodes: Vec<_> = (1..=5).map(|n| NodeId::new(n).unwrap()).collect();
        nodes.iter().for_each(|_| list.grow());
        nodes.iter().for_each(|&node| list.push(node));
        assert_eq!(members(&list), [1, 2, 3, 4, 5]);
        list.remove(nodes[2]);
        list.remove(nodes[0]);
        list.remove(nodes[4]);
        assert_eq!((members(&list), list.len()), (vec![2, 4], 2));
        list.push(nodes[0]);
        assert_eq!(members(&list), [2, 4, 1]);
    }
}
