//! What a lock guards: the highest level that was made, and the levels below as its parts.

use crate::error::{Error, Expected, Result};
use crate::ids::SeqHandle;
use crate::manager::KVCacheManager;
use crate::plan::PlanBuffer;
use crate::pool::{BlockPool, NoCache, Reclaim};
use crate::prefix::PrefixCache;
use crate::scheduler::{Parts, Scheduler, SchedulerConfig};

/// The state behind one lock.
pub enum Core {
    /// `BlockPool(...)`, and the cache that registered itself with it, if any.
    Blocks(Box<Blocks>),
    /// `KVCacheManager(...)`.
    Manager(Box<KVCacheManager>),
    /// `Scheduler(...)`.
    Scheduler(Box<Scheduler>),
}

/// A bare pool.
pub struct Blocks {
    pool: BlockPool,
    cache: Option<PrefixCache>,
    no_cache: NoCache,
}

impl Blocks {
    pub fn new(pool: BlockPool) -> Self {
        Self {
            pool,
            cache: None,
            no_cache: NoCache,
        }
    }
}

impl Core {
    pub fn pool(&mut self) -> &mut BlockPool {
        self.pool_and_cache().0
    }

    /// The pool and what it reclaims blocks from.
    pub fn pool_and_cache(&mut self) -> (&mut BlockPool, &mut dyn Reclaim) {
        match self {
            Self::Blocks(blocks) => {
                let Blocks { pool, cache, no_cache } = &mut **blocks;
                (pool, cache.as_mut().map_or(no_cache as &mut dyn Reclaim, |cache| cache))
            }
            Self::Manager(manager) => {
                let (pool, cache) = manager.parts_mut();
                (pool, cache)
            }
            Self::Scheduler(scheduler) => {
                let (pool, cache) = scheduler.manager_mut().parts_mut();
                (pool, cache)
            }
        }
    }

    /// The trie, and the pool that its calls go with.
    ///
    /// # Errors
    /// `Corruption`: only an object that was made with a cache asks.
    pub fn cache(&mut self) -> Result<(&mut PrefixCache, &mut BlockPool)> {
        let (pool, cache) = match self {
            Self::Blocks(blocks) => (
                &mut blocks.pool,
                blocks.cache.as_mut().ok_or_else(|| missing("the number of caches"))?,
            ),
            Self::Manager(manager) => manager.parts_mut(),
            Self::Scheduler(scheduler) => scheduler.manager_mut().parts_mut(),
        };
        Ok((cache, pool))
    }

    /// The sequences.
    ///
    /// # Errors
    /// `Corruption`: only an object that was made with a manager asks.
    pub fn manager(&mut self) -> Result<&mut KVCacheManager> {
        match self {
            Self::Manager(manager) => Ok(manager),
            Self::Scheduler(scheduler) => Ok(scheduler.manager_mut()),
            Self::Blocks(_) => Err(missing("the number of managers")),
        }
    }

    /// The manager, to change a sequence of the caller's: a scheduler's own are out of bounds. O(1).
    ///
    /// # Errors
    /// `Unsupported` for a sequence of a request; otherwise as `manager`.
    pub fn manager_of(&mut self, seq: SeqHandle) -> Result<&mut KVCacheManager> {
        match self {
            Self::Scheduler(scheduler) if scheduler.owns(seq) => {
                let expected = Expected::That("a sequence that is not a request's");
                Err(Error::Unsupported {
                    argument: "seq",
                    got: seq.0.into(),
                    expected,
                })
            }
            _ => self.manager(),
        }
    }

    /// The manager, to take what is to be done before the next step: a scheduler puts that into its plans.
    ///
    /// # Errors
    /// `ForeignStep` under a scheduler; otherwise as `manager`.
    pub fn manager_of_steps(&mut self) -> Result<&mut KVCacheManager> {
        match self {
            Self::Scheduler(_) => Err(Error::ForeignStep),
            Self::Blocks(_) | Self::Manager(_) => self.manager(),
        }
    }

    /// The requests.
    ///
    /// # Errors
    /// `Corruption`: only an object that was made with a scheduler asks.
    pub fn scheduler(&mut self) -> Result<&mut Scheduler> {
        match self {
            Self::Scheduler(scheduler) => Ok(scheduler),
            Self::Blocks(_) | Self::Manager(_) => Err(missing("the number of schedulers")),
        }
    }

    /// Puts a scheduler over the manager of an open core, which moves into it. False: it is under one already.
    /// O(size of a plan).
    ///
    /// # Errors
    /// As `Scheduler::with_manager`; the manager is as before then.
    pub fn adopt(place: &mut Option<Self>, config: &SchedulerConfig) -> Result<bool> {
        let parts = match place {
            None => return Err(Error::Closed),
            Some(Self::Manager(manager)) => Parts::new(config.clone(), manager)?,
            Some(Self::Blocks(_) | Self::Scheduler(_)) => return Ok(false),
        };
        // From here on nothing is refused any more.
        *place = place.take().map(|core| match core {
            Self::Manager(manager) => Self::Scheduler(Box::new(Scheduler::over(parts, *manager))),
            other => other,
        });
        Ok(true)
    }

    /// Gives a bare pool a cache. False: there is one, or the pool is a manager's.
    ///
    /// # Errors
    /// As `PrefixCache::new`.
    pub fn make_cache(&mut self) -> Result<bool> {
        match self {
            Self::Blocks(blocks) if blocks.cache.is_none() => {
                blocks.cache = Some(PrefixCache::new(&blocks.pool)?);
                Ok(true)
            }
            Self::Blocks(_) | Self::Manager(_) | Self::Scheduler(_) => Ok(false),
        }
    }

    /// The pool and its cache, to begin or complete a step.
    ///
    /// # Errors
    /// `ForeignStep` under a scheduler, which numbers the steps itself.
    pub fn pool_of_steps(&mut self) -> Result<(&mut BlockPool, &mut dyn Reclaim)> {
        match self {
            Self::Scheduler(_) => Err(Error::ForeignStep),
            Self::Blocks(_) | Self::Manager(_) => Ok(self.pool_and_cache()),
        }
    }

    /// Ends it all but for the memory that arrays may still show.
    pub(crate) fn into_plan_memory(self) -> Option<PlanBuffer> {
        match self {
            Self::Blocks(_) | Self::Manager(_) => None,
            Self::Scheduler(scheduler) => Some(scheduler.into_plan_memory()),
        }
    }

    /// Checks every invariant of every level there is.
    ///
    /// # Errors
    /// `Corruption` that names the first one broken.
    pub fn check(&mut self) -> Result<()> {
        match self {
            Self::Blocks(blocks) => {
                blocks.pool.check()?;
                blocks.cache.as_ref().map_or(Ok(()), |cache| cache.check(&blocks.pool))
            }
            Self::Manager(manager) => manager.check(),
            Self::Scheduler(scheduler) => scheduler.check(),
        }
    }
}

fn missing(what: &'static str) -> Error {
    Error::corruption("binding", what, 0_u64, 0_u64, 1_u64)
}
