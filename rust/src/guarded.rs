//! A lock that remembers damage.
//!
//! A panic under the lock may have left its value between two states. It is caught here, and the value is given to
//! nobody from then on: the bindings turn that into an exception of every later call, and the process lives.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, MutexGuard, OnceLock, TryLockError};

/// A value behind a lock, until it is damaged.
pub(crate) struct Guarded<T> {
    value: Mutex<T>,
    /// What damaged it.
    damage: OnceLock<String>,
}

/// Why a call was not made: what damaged the value.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Damaged(pub(crate) String);

impl<T> Guarded<T> {
    pub(crate) fn new(value: T) -> Self {
        Self {
            value: Mutex::new(value),
            damage: OnceLock::new(),
        }
    }

    /// What damaged the value, if it is.
    pub(crate) fn damage(&self) -> Option<&str> {
        self.damage.get().map(String::as_str)
    }

    /// Gives the value to nobody from now on. The first reason is kept.
    pub(crate) fn condemn(&self, reason: String) -> &str {
        self.damage.get_or_init(|| reason)
    }

    /// Calls `f` if the lock is free at this moment; gives `f` back if it is not.
    pub(crate) fn try_call<R, F: FnOnce(&mut T) -> R>(&self, f: F) -> Result<Result<R, Damaged>, F> {
        match self.value.try_lock() {
            Ok(guard) => Ok(self.run(guard, f)),
            Err(TryLockError::Poisoned(poisoned)) => Ok(self.run(poisoned.into_inner(), f)),
            Err(TryLockError::WouldBlock) => Err(f),
        }
    }

    /// Waits for the lock and calls `f`.
    pub(crate) fn call<R>(&self, f: impl FnOnce(&mut T) -> R) -> Result<R, Damaged> {
        // A panic is caught before it reaches the lock, so poison says nothing that `damage` does not.
        let guard = self.value.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        self.run(guard, f)
    }

    /// Waits for the lock and takes the value out, damaged or not.
    pub(crate) fn replace(&self, value: T) -> T {
        let mut guard = self.value.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        std::mem::replace(&mut guard, value)
    }

    fn run<R>(&self, mut guard: MutexGuard<'_, T>, f: impl FnOnce(&mut T) -> R) -> Result<R, Damaged> {
        if let Some(reason) = self.damage() {
            return Err(Damaged(reason.to_owned()));
        }
        catch_unwind(AssertUnwindSafe(|| f(&mut guard)))
            .map_err(|panic| Damaged(self.condemn(panic_message(panic.as_ref())).to_owned()))
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    format!("internal error: {}", text.unwrap_or("unknown"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_damages_for_good() {
        let guarded = Guarded::new(vec![1, 2, 3]);
        assert_eq!(guarded.call(|v| v.len()), Ok(3));
        let failed = guarded.call(|v| {
            v.clear();
            v[0]
        });
        let Err(Damaged(reason)) = failed else {
            panic!("{failed:?}")
        };
        assert!(reason.starts_with("internal error: index out of bounds"), "{reason}");
        assert_eq!(guarded.call(|v| v.len()), Err(Damaged(reason.clone())));
        assert!(matches!(guarded.try_call(|v| v.len()), Ok(Err(Damaged(again))) if again == reason));
        assert_eq!(guarded.condemn("later".to_owned()), reason);
    }

    #[test]
    fn condemned_values_are_given_to_nobody() {
        let guarded = Guarded::new(());
        guarded.condemn("A3 is broken".to_owned());
        assert_eq!(guarded.call(|()| ()), Err(Damaged("A3 is broken".to_owned())));
        assert_eq!(guarded.damage(), Some("A3 is broken"));
    }

    #[test]
    fn what_is_damaged_can_be_taken_out() {
        let guarded = Guarded::new(5);
        guarded.condemn("A3 is broken".to_owned());
        assert_eq!((guarded.replace(6), guarded.replace(7)), (5, 6));
    }

    #[test]
    fn a_taken_lock_gives_the_call_back() {
        let guarded = Guarded::new(0);
        let inner = guarded.call(|_| guarded.try_call(|_| ()).is_err());
        assert_eq!(inner, Ok(true));
    }
}
