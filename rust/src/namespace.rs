//! The roots of the prefix trie.
//!
//! A namespace is everything that has to be equal, besides the tokens, for two prompts to share a prefix: the
//! tenant, a salt, and extra keys such as an adapter's id. It is found by that key as typed values, compared and never
//! concatenated, so no choice of salt can imitate another tenant. Namespaces are counted: one lives while it is held
//! (by a handle or a sequence) or has nodes, and vanishes with the last of both.

use std::collections::HashMap;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::ids::{HandleKind, NamespaceHandle};

/// One of a namespace's extra keys. `Text("1")`, `Bytes(b"1")` and `Int(1)` are different keys.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ExtraKey {
    /// A string.
    Text(Box<str>),
    /// A byte string.
    Bytes(Box<[u8]>),
    /// A number.
    Int(i64),
}

/// What tells one namespace from another.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct NamespaceKey {
    /// Whose tokens these are. Blocks that change tenant are zeroed.
    pub tenant: Box<str>,
    /// A secret that keeps prompts of one tenant apart.
    pub cache_salt: Box<str>,
    /// Whatever else changes what is computed: an adapter's id, a prompt embedding's digest.
    pub extra_keys: Box<[ExtraKey]>,
}

/// A number for a tenant, never used again after its last namespace vanished (a block may still hold its data).
pub(crate) type TenantSerial = u32;

/// The last serial: tenants that come after it share it, and count as changed each time.
pub(crate) const LAST_SERIAL: TenantSerial = TenantSerial::MAX;

#[derive(Clone, Debug, PartialEq, Eq)]
struct Root {
    generation: u32,
    /// None: the place is free.
    key: Option<Arc<NamespaceKey>>,
    /// Sequences that are in it.
    holds: u64,
    /// Handles given to callers and not dropped. Apart from `holds`, so that a handle dropped too often cannot end
    /// the namespace of a sequence.
    handles: u64,
    nodes: usize,
    tenant: TenantSerial,
    /// Rises when what was published here is withdrawn; see `PrefixCache::era`.
    withdrawals: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Tenant {
    serial: TenantSerial,
    roots: usize,
}

/// All namespaces of a cache.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Namespaces {
    roots: Vec<Root>,
    free: Vec<u32>,
    /// Places that are never given out again, as a handle to their first life would fit once more.
    retired: usize,
    by_key: HashMap<Arc<NamespaceKey>, u32>,
    tenants: HashMap<Box<str>, Tenant>,
    serials: TenantSerial,
}

impl Namespaces {
    pub(crate) fn len(&self) -> usize {
        self.by_key.len()
    }

    pub(crate) fn find(&self, key: &NamespaceKey) -> Option<u32> {
        self.by_key.get(key).copied()
    }

    /// The namespace's place, made if need be, with one hold more.
    pub(crate) fn hold_key(&mut self, key: NamespaceKey) -> u32 {
        let root = self.find(&key).unwrap_or_else(|| self.make(key));
        self.hold(root);
        root
    }

    /// A handle for the namespace, made if need be.
    pub(crate) fn open(&mut self, key: NamespaceKey) -> NamespaceHandle {
        let root = self.find(&key).unwrap_or_else(|| self.make(key));
        let place = &mut self.roots[root as usize];
        place.handles += 1;
        NamespaceHandle::new(root, place.generation)
    }

    /// The place of a handle that can be dropped once more.
    pub(crate) fn resolve_open(&self, handle: NamespaceHandle) -> Result<u32> {
        let root = self.resolve(handle)?;
        if self.roots[root as usize].handles == 0 {
            return Err(Self::stale(handle));
        }
        Ok(root)
    }

    /// Drops a handle that `resolve_open` has found.
    pub(crate) fn close(&mut self, root: u32) {
        self.roots[root as usize].handles -= 1;
        self.vanish_if_idle(root);
    }

    fn make(&mut self, key: NamespaceKey) -> u32 {
        let serials = &mut self.serials;
        let tenant = self.tenants.entry(key.tenant.clone()).or_insert_with(|| {
            *serials = serials.saturating_add(1);
            Tenant {
                serial: *serials,
                roots: 0,
            }
        });
        tenant.roots += 1;
        let key = Arc::new(key);
        let root = Root {
            generation: 1,
            key: Some(Arc::clone(&key)),
            holds: 0,
            handles: 0,
            nodes: 0,
            tenant: tenant.serial,
            withdrawals: 0,
        };
        let index = if let Some(index) = self.free.pop() {
            let place = &mut self.roots[index as usize];
            *place = Root {
                generation: place.generation,
                ..root
            };
            index
        } else {
            self.roots.push(root);
            #[allow(clippy::cast_possible_truncation)] // one needs a sequence, a handle or a block: below 2³²
            let index = (self.roots.len() - 1) as u32;
            index
        };
        self.by_key.insert(key, index);
        index
    }

    pub(crate) fn hold(&mut self, root: u32) {
        self.roots[root as usize].holds += 1;
    }

    /// Gives back a sequence's hold.
    pub(crate) fn unhold(&mut self, root: u32) -> Result<()> {
        let place = &mut self.roots[root as usize];
        place.holds = place
            .holds
            .checked_sub(1)
            .ok_or_else(|| Error::corruption("L2", "the holds of a namespace that a sequence gives up", root, 0, 1))?;
        self.vanish_if_idle(root);
        Ok(())
    }

    pub(crate) fn add_node(&mut self, root: u32) {
        self.roots[root as usize].nodes += 1;
    }

    pub(crate) fn remove_node(&mut self, root: u32) {
        let place = &mut self.roots[root as usize];
        place.nodes = place.nodes.saturating_sub(1);
        self.vanish_if_idle(root);
    }

    fn vanish_if_idle(&mut self, root: u32) {
        let place = &mut self.roots[root as usize];
        if place.holds > 0 || place.handles > 0 || place.nodes > 0 {
            return;
        }
        let Some(key) = place.key.take() else { return };
        if let Some(next) = place.generation.checked_add(1) {
            place.generation = next;
            self.free.push(root);
        } else {
            self.retired += 1;
        }
        self.by_key.remove(&key);
        if let Some(tenant) = self.tenants.get_mut(&key.tenant) {
            tenant.roots -= 1;
            if tenant.roots == 0 {
                self.tenants.remove(&key.tenant);
            }
        }
    }

    /// The place of a handle.
    pub(crate) fn resolve(&self, handle: NamespaceHandle) -> Result<u32> {
        match self.roots.get(handle.index()) {
            Some(root) if root.key.is_some() && root.generation == handle.generation() => {
                #[allow(clippy::cast_possible_truncation)] // it was made from a u32
                let index = handle.index() as u32;
                Ok(index)
            }
            _ => Err(Self::stale(handle)),
        }
    }

    fn stale(handle: NamespaceHandle) -> Error {
        Error::StaleHandle {
            kind: HandleKind::Namespace,
            handle: handle.0,
        }
    }

    pub(crate) fn tenant(&self, root: u32) -> TenantSerial {
        self.roots[root as usize].tenant
    }

    pub(crate) fn holds(&self, root: u32) -> u64 {
        self.roots[root as usize].holds
    }

    pub(crate) fn withdrawals(&self, root: u32) -> u64 {
        self.roots[root as usize].withdrawals
    }

    pub(crate) fn withdraw(&mut self, root: u32) {
        self.roots[root as usize].withdrawals += 1;
    }

    /// Checks counts against `nodes`, the number of nodes found per place. O(namespaces).
    pub(crate) fn check(&self, nodes: &HashMap<u32, usize>) -> Result<()> {
        let mut living = 0;
        for (index, root) in self.roots.iter().enumerate() {
            #[allow(clippy::cast_possible_truncation)] // places are u32
            let found = nodes.get(&(index as u32)).copied().unwrap_or(0);
            if root.nodes != found {
                return Err(Error::corruption(
                    "P6",
                    "a namespace's number of nodes",
                    index,
                    root.nodes,
                    found,
                ));
            }
            let Some(key) = &root.key else { continue };
            living += 1;
            if root.holds == 0 && root.handles == 0 && root.nodes == 0 {
                return Err(Error::corruption("P6", "an idle namespace", index, 1, 0));
            }
            if self.find(key).is_none_or(|found| found as usize != index) {
                return Err(Error::corruption("P6", "a namespace's entry by key", index, 0, 1));
            }
            if self
                .tenants
                .get(&key.tenant)
                .is_none_or(|tenant| tenant.serial != root.tenant)
            {
                return Err(Error::corruption("P6", "a namespace's tenant", index, 0, root.tenant));
            }
        }
        let by_tenant: usize = self.tenants.values().map(|tenant| tenant.roots).sum();
        for (what, found) in [
            ("the number of namespaces by key", self.by_key.len()),
            ("the number of namespaces by tenant", by_tenant),
            (
                "the number of places in use",
                self.roots.len() - self.free.len() - self.retired,
            ),
        ] {
            if found != living {
                return Err(Error::corruption("P6", what, 0, found, living));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handle_never_fits_again() {
        let mut namespaces = Namespaces::default();
        let key = |tenant: &str| NamespaceKey {
            tenant: tenant.into(),
            ..NamespaceKey::default()
        };
        let first = namespaces.open(key("a"));
        namespaces.close(namespaces.resolve_open(first).unwrap());
        namespaces.roots[0].generation = u32::MAX;
        let last = namespaces.open(key("a"));
        assert_eq!((last.index(), last.generation()), (0, u32::MAX));
        namespaces.close(namespaces.resolve_open(last).unwrap());
        // The place has no number left for another life.
        let next = namespaces.open(key("b"));
        assert_eq!((next.index(), namespaces.len()), (1, 1));
        for handle in [first, last, NamespaceHandle::new(0, 0)] {
            assert!(namespaces.resolve(handle).is_err(), "{handle:?}");
        }
        namespaces.check(&HashMap::new()).unwrap();
    }
}
