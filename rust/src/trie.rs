//! The nodes of the prefix trie, and how one is found.
//!
//! A node stands for one full block of tokens after everything above it. It is found by (parent, the block's tokens,
//! the content in it): one hash table over all nodes narrows the search, and the tokens are compared, so that two
//! different prompts never meet. The table is an array of chain heads with links both ways in the nodes: no tombstones,
//! no pause to grow, removal without a walk, and as zeroed pages it costs nothing until used.
//!
//! A run of blocks is committed at once and gets neighbouring places, so the node after the parent's is tried before
//! the table: following a long prefix reads memory in order, and hashes nothing.
//!
//! A node is *pinned* while its block is (somebody holds it, or a step in flight reads it), or a child is pinned.
//! [`Trie::pin`] and [`Trie::unpin`] count those reasons and pass the change on to the parent, so that the eviction
//! list holds exactly the nodes that can go, children before parents.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, Hasher};

use crate::content::Part;
use crate::error::{Error, Result};
use crate::ids::{BlockId, HandleKind, NodeHandle, NodeId};
use crate::lru::LruList;
use crate::pool::zeroed;

/// One node. Numbers of nodes are u32 with 0 for none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Node {
    /// The node above, or none under a namespace's root.
    parent: u32,
    /// The namespace's place.
    namespace: u32,
    /// Where the tokens' keys and values are. The null block marks a place that is free.
    block: BlockId,
    /// The node before in the chain of the table; for the first one the chain's number, marked with `HEAD`.
    before: u32,
    /// The next node in the chain of the table, or in the list of free places.
    chain: u32,
    /// Reasons against eviction: the block's own, and one per pinned child.
    pins: u32,
    generation: u32,
}

/// Marks the number of a chain where the number of a node could stand; both are below 2³¹.
const HEAD: u32 = 1 << 31;

/// A hasher seeded at random per cache, against prompts made to collide.
///
/// It decides nothing but where a node is looked for, so any two seeds are equal for our purposes.
#[derive(Clone, Debug, Default)]
struct Seed(foldhash::quality::RandomState);

impl PartialEq for Seed {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

/// What a node is found by. `tokens` is one full block.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Query<'a> {
    pub(crate) parent: Option<NodeId>,
    pub(crate) namespace: u32,
    pub(crate) tokens: &'a [u32],
    pub(crate) content: &'a [Part],
}

/// All nodes of a cache.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Trie {
    block_size: usize,
    seed: Seed,
    nodes: Vec<Node>,
    /// The tokens of node i are at i * `block_size`.
    tokens: Vec<u32>,
    /// Only of nodes that have any.
    content: HashMap<NodeId, Box<[Part]>>,
    /// The first node of each chain.
    heads: Vec<u32>,
    /// The first free place.
    free: u32,
    /// Places that are never given out again, as a handle to their first life would fit once more.
    retired: usize,
    len: usize,
    lru: LruList,
}

fn number(node: Option<NodeId>) -> u32 {
    node.map_or(0, NodeId::get)
}

impl Trie {
    pub(crate) fn new(num_blocks: usize, block_size: usize) -> Result<Self> {
        // A node has a block of its own, so there are fewer nodes than blocks. Seven heads for eight nodes keep a
        // full cache with its pool within 64 bytes per block.
        let heads = num_blocks - num_blocks / 8;
        Ok(Self {
            block_size,
            seed: Seed::default(),
            nodes: vec![Node::default()],
            tokens: vec![0; block_size],
            content: HashMap::new(),
            heads: zeroed!(u32, heads)?,
            free: 0,
            retired: 0,
            len: 0,
            lru: LruList::new(),
        })
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn evictable(&self) -> usize {
        self.lru.len()
    }

    /// Is there a reason against the node's eviction?
    pub(crate) fn is_pinned(&self, node: NodeId) -> bool {
        self.nodes[node.index()].pins > 0
    }

    pub(crate) fn block(&self, node: NodeId) -> BlockId {
        self.nodes[node.index()].block
    }

    pub(crate) fn parent(&self, node: NodeId) -> Option<NodeId> {
        NodeId::new(self.nodes[node.index()].parent)
    }

    pub(crate) fn namespace(&self, node: NodeId) -> u32 {
        self.nodes[node.index()].namespace
    }

    pub(crate) fn handle(&self, node: NodeId) -> NodeHandle {
        NodeHandle::new(node.get(), self.nodes[node.index()].generation)
    }

    /// The node of a handle.
    pub(crate) fn resolve(&self, handle: NodeHandle) -> Result<NodeId> {
        let node = self.nodes.get(handle.index());
        #[allow(clippy::cast_possible_truncation)] // it was made from a u32
        match (node, NodeId::new(handle.index() as u32)) {
            (Some(node), Some(id)) if node.block != BlockId::NULL && node.generation == handle.generation() => Ok(id),
            _ => Err(Error::StaleHandle {
                kind: HandleKind::Node,
                handle: handle.0,
            }),
        }
    }

    /// All nodes, in the order of their numbers.
    pub(crate) fn iter(&self) -> impl Iterator<Item = NodeId> + '_ {
        #[allow(clippy::cast_possible_truncation)] // numbers of nodes are u32
        let ids = (1..self.nodes.len() as u32).filter_map(NodeId::new);
        ids.filter(|node| self.block(*node) != BlockId::NULL)
    }

    fn tokens(&self, node: NodeId) -> &[u32] {
        &self.tokens[node.index() * self.block_size..][..self.block_size]
    }

    fn content(&self, node: NodeId) -> &[Part] {
        self.content.get(&node).map_or(&[], |parts| &**parts)
    }

    /// The chain that the node of `query` is in.
    fn chain_of(&self, query: &Query<'_>) -> u32 {
        let mut hasher = self.seed.0.build_hasher();
        hasher.write(bytemuck::cast_slice(query.tokens));
        for part in query.content {
            part.hash(&mut hasher);
        }
        // The parent last: the hash of the next block's tokens does not wait for this block's node.
        hasher.write_u64(u64::from(number(query.parent)) << 32 | u64::from(query.namespace));
        // Below the number of heads, without a division.
        #[allow(clippy::cast_possible_truncation)] // which is below 2³¹, as that of blocks
        let chain = (((hasher.finish() >> 32) * self.heads.len() as u64) >> 32) as u32;
        chain
    }

    /// The node of a block of tokens. O(block size) on average.
    pub(crate) fn find(&self, query: &Query<'_>) -> Option<NodeId> {
        let neighbour = query.parent.and_then(|parent| NodeId::new(parent.get() + 1));
        neighbour
            .filter(|&id| id.index() < self.nodes.len() && self.is_at(id, query))
            .or_else(|| self.find_in_chain(query))
    }

    fn find_in_chain(&self, query: &Query<'_>) -> Option<NodeId> {
        let first = NodeId::new(self.heads[self.chain_of(query) as usize]);
        let mut chain = std::iter::successors(first, |id| NodeId::new(self.nodes[id.index()].chain));
        chain.find(|&id| self.is_at(id, query))
    }

    /// Is this the node that `query` asks for? The parent comes first: it tells most others apart.
    fn is_at(&self, id: NodeId, query: &Query<'_>) -> bool {
        let node = &self.nodes[id.index()];
        node.parent == number(query.parent)
            && node.block != BlockId::NULL
            && node.namespace == query.namespace
            && self.tokens(id) == query.tokens
            && (self.content.is_empty() && query.content.is_empty() || self.content(id) == query.content)
    }

    /// Adds a node that is not there, whose block is pinned. O(block size), amortised.
    pub(crate) fn insert(&mut self, query: &Query<'_>, block: BlockId) -> NodeId {
        let chain = self.chain_of(query);
        let id = self.take_place();
        let after = self.heads[chain as usize];
        if after != 0 {
            self.nodes[after as usize].before = id.get();
        }
        let node = &mut self.nodes[id.index()];
        *node = Node {
            parent: number(query.parent),
            namespace: query.namespace,
            block,
            before: HEAD | chain,
            chain: after,
            pins: 1,
            generation: node.generation,
        };
        self.heads[chain as usize] = id.get();
        self.tokens[id.index() * self.block_size..][..self.block_size].copy_from_slice(query.tokens);
        if !query.content.is_empty() {
            self.content.insert(id, query.content.into());
        }
        self.len += 1;
        if let Some(parent) = query.parent {
            self.pin(parent);
        }
        id
    }

    /// A free place, or a new one.
    fn take_place(&mut self) -> NodeId {
        if let Some(id) = NodeId::new(self.free) {
            self.free = self.nodes[id.index()].chain;
            return id;
        }
        // Fewer than 2³¹ nodes exist, as many as blocks, and a place retires after 2³² of them; the first place is the
        // one that 0 stands for.
        #[allow(clippy::cast_possible_truncation)]
        let index = self.nodes.len() as u32;
        self.nodes.push(Node::default());
        self.tokens.resize(self.tokens.len() + self.block_size, 0);
        self.lru.grow();
        NodeId::new(index).unwrap_or_else(|| unreachable!("place 0 is made with the trie"))
    }

    /// Takes out a node that is not pinned, or whose whole namespace goes. O(1).
    pub(crate) fn remove(&mut self, id: NodeId) {
        let node = self.nodes[id.index()];
        if node.pins == 0 {
            self.lru.remove(id);
        }
        if node.before & HEAD == 0 {
            self.nodes[node.before as usize].chain = node.chain;
        } else {
            self.heads[(node.before ^ HEAD) as usize] = node.chain;
        }
        if node.chain != 0 {
            self.nodes[node.chain as usize].before = node.before;
        }
        if !self.content.is_empty() {
            self.content.remove(&id);
        }
        let mut place = Node {
            generation: node.generation,
            ..Node::default()
        };
        if let Some(next) = node.generation.checked_add(1) {
            place.generation = next;
            place.chain = self.free;
            self.free = id.get();
        } else {
            self.retired += 1;
        }
        self.nodes[id.index()] = place;
        self.len -= 1;
    }

    /// The next nodes to evict, in order; how many were written to `out`.
    pub(crate) fn least_recent(&self, out: &mut [NodeId]) -> usize {
        let list = std::iter::successors(self.lru.first(), |&id| self.lru.next(id));
        let count = list.zip(&mut *out).map(|(id, place)| *place = id).count();
        // Where a large trie is not in the processor's caches, a removal waits for memory: for what is before and after
        // the node in its chain. Asked for together, without a branch between, those of many nodes arrive together.
        let neighbours = out[..count].iter().map(|id| {
            let node = &self.nodes[id.index()];
            let first = node.before & HEAD != 0;
            let (head, before) = if first {
                (node.before ^ HEAD, 0)
            } else {
                (0, node.before)
            };
            self.heads[head as usize] ^ self.nodes[before as usize].chain ^ self.nodes[node.chain as usize].before
        });
        std::hint::black_box(neighbours.fold(0, |sum, value| sum ^ value));
        count
    }

    /// One more reason against the node's eviction. O(1), and O(depth) where it is the first below many.
    pub(crate) fn pin(&mut self, id: NodeId) {
        let mut next = Some(id);
        while let Some(id) = next {
            let node = &mut self.nodes[id.index()];
            node.pins += 1;
            if node.pins > 1 {
                return;
            }
            next = NodeId::new(node.parent);
            self.lru.remove(id);
        }
    }

    /// One reason less. With the last one the node becomes the most recently used of those that can go.
    pub(crate) fn unpin(&mut self, id: NodeId) {
        let mut next = Some(id);
        while let Some(id) = next {
            let node = &mut self.nodes[id.index()];
            debug_assert!(node.pins > 0, "node {id:?} is not pinned");
            node.pins = node.pins.saturating_sub(1);
            if node.pins > 0 {
                return;
            }
            next = NodeId::new(node.parent);
            self.lru.push(id);
        }
    }

    /// Checks the table, the places, the pins and the eviction list; `pinned` says whether a block is pinned.
    /// O(nodes).
    pub(crate) fn check(&self, pinned: impl Fn(BlockId) -> bool) -> Result<()> {
        let broken = |invariant, what, at: NodeId, found: usize, expected: usize| {
            Err(Error::corruption(invariant, what, at.get(), found, expected))
        };
        // Reasons against eviction, counted afresh: the block's own, then children, each of which counts once if
        // pinned.
        let mut pins = vec![0_u32; self.nodes.len()];
        for id in self.iter() {
            pins[id.index()] += u32::from(pinned(self.block(id)));
            if self.nodes[id.index()].pins > 0
                && let Some(parent) = self.parent(id)
            {
                pins[parent.index()] += 1;
            }
        }
        let mut count = 0;
        for id in self.iter() {
            count += 1;
            let node = &self.nodes[id.index()];
            if node.pins != pins[id.index()] {
                return broken("A4", "a node's pins", id, node.pins as usize, pins[id.index()] as usize);
            }
            if let Some(parent) = self.parent(id) {
                let above = &self.nodes[parent.index()];
                if above.block == BlockId::NULL || above.namespace != node.namespace {
                    return broken("P5", "a node's parent", id, parent.index(), 0);
                }
            }
            let (tokens, content) = (self.tokens(id), self.content(id));
            let query = Query {
                parent: self.parent(id),
                namespace: node.namespace,
                tokens,
                content,
            };
            // Twice: a neighbour of its parent is found without the table, and must be in it all the same.
            if self.find(&query) != Some(id) || self.find_in_chain(&query) != Some(id) {
                return broken("P7", "the node found by a node's own tokens", id, 0, id.index());
            }
            let before = if node.before & HEAD == 0 {
                self.nodes[node.before as usize].chain
            } else {
                self.heads[(node.before ^ HEAD) as usize]
            };
            if before != id.get() {
                return broken("P7", "the link to a node in its chain", id, before as usize, id.index());
            }
        }
        if count != self.len {
            return Err(Error::corruption("P7", "the number of nodes", 0, self.len, count));
        }
        let chained: usize = self.heads.iter().map(|&head| self.chain_length(head)).sum();
        let places = self.chain_length(self.free) + self.retired + 1 + self.len;
        if chained != self.len || places != self.nodes.len() {
            return Err(Error::corruption(
                "P7",
                "the number of nodes in chains",
                0,
                chained,
                self.len,
            ));
        }
        self.check_lru()
    }

    fn chain_length(&self, first: u32) -> usize {
        let next = |id: &NodeId| NodeId::new(self.nodes[id.index()].chain);
        std::iter::successors(NodeId::new(first), next)
            .take(self.nodes.len() + 1)
            .count()
    }

    /// Are exactly the nodes without pins in the list, children before parents?
    fn check_lru(&self) -> Result<()> {
        let mut order = vec![0_usize; self.nodes.len()];
        let list = std::iter::successors(self.lru.first(), |&id| self.lru.next(id)).take(self.nodes.len());
        let mut listed = 0;
        for id in list {
            listed += 1;
            order[id.index()] = listed;
        }
        if listed != self.lru.len() {
            return Err(Error::corruption(
                "P5",
                "the length of the eviction list",
                0,
                self.lru.len(),
                listed,
            ));
        }
        for id in self.iter() {
            let (node, place) = (&self.nodes[id.index()], order[id.index()]);
            if (node.pins == 0) != (place > 0) {
                return Err(Error::corruption(
                    "A4",
                    "a node's place in the eviction list",
                    id.get(),
                    place,
                    node.pins,
                ));
            }
            let above = order[node.parent as usize];
            if node.parent != 0 && above > 0 && (place == 0 || place > above) {
                return Err(Error::corruption(
                    "P5",
                    "the turn of a node before its parent",
                    id.get(),
                    place,
                    above,
                ));
            }
        }
        let unpinned = self.iter().filter(|id| self.nodes[id.index()].pins == 0).count();
        if unpinned != listed {
            return Err(Error::corruption(
                "P5",
                "the number of evictable nodes",
                0,
                listed,
                unpinned,
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handle_never_fits_again() {
        let mut trie = Trie::new(8, 2).unwrap();
        let query = |tokens| Query {
            parent: None,
            namespace: 0,
            tokens,
            content: &[],
        };
        let insert = |trie: &mut Trie, tokens| {
            let node = trie.insert(&query(tokens), BlockId(1));
            trie.check(|_| true).unwrap();
            (node, trie.handle(node))
        };
        let (node, first) = insert(&mut trie, &[1, 2]);
        trie.remove(node);
        trie.nodes[node.index()].generation = u32::MAX;
        let (again, last) = insert(&mut trie, &[1, 2]);
        assert_eq!((again, last.generation()), (node, u32::MAX));
        trie.remove(again);
        trie.check(|_| true).unwrap();
        // The place has no number left for another life.
        let (other, _) = insert(&mut trie, &[3, 4]);
        assert_ne!(other, node);
        for handle in [first, last, NodeHandle::new(node.get(), 0)] {
            assert!(trie.resolve(handle).is_err(), "{handle:?}");
        }
        assert_eq!((trie.find(&query(&[1, 2])), trie.len()), (None, 1));
    }
}
