//! The requests of a scheduler: a slab, so that rows name them by a small number.

use std::ops::{Index, IndexMut};

use crate::request::Request;

/// Places of requests, reused when they end.
#[derive(Debug, Default)]
pub(crate) struct Requests {
    places: Vec<Option<Request>>,
    free: Vec<u32>,
}

impl Requests {
    /// O(1) amortised.
    pub fn insert(&mut self, request: Request) -> u32 {
        if let Some(place) = self.free.pop() {
            self.places[place as usize] = Some(request);
            return place;
        }
        self.places.push(Some(request));
        u32::try_from(self.places.len() - 1).expect("fewer than 2^32 requests")
    }

    /// Gives the place up.
    ///
    /// # Panics
    /// If it is not taken.
    pub fn remove(&mut self, place: u32) -> Request {
        self.free.push(place);
        self.places[place as usize].take().expect("a request")
    }

    pub fn len(&self) -> usize {
        self.places.len() - self.free.len()
    }

    pub fn iter(&self) -> impl Iterator<Item = (u32, &Request)> {
        (0..)
            .zip(&self.places)
            .filter_map(|(place, request)| Some((place, request.as_ref()?)))
    }
}

impl Index<u32> for Requests {
    type Output = Request;

    fn index(&self, place: u32) -> &Request {
        self.places[place as usize].as_ref().expect("a request")
    }
}

impl IndexMut<u32> for Requests {
    fn index_mut(&mut self, place: u32) -> &mut Request {
        self.places[place as usize].as_mut().expect("a request")
    }
}
