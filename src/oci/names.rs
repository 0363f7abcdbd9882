//! Names to addresses.
//!
//! The system's resolver blocks a thread for as long as it likes: a name server that is gone costs tens
//! of seconds. So at most [`MAX_LOOKUPS`] threads of the blocking pool are in it; who comes later waits
//! as a future, within the time that connecting may take. A name that was found before is found again
//! when the resolver fails or is slow.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use tokio::sync::Semaphore;

/// Lookups that run at the same time.
pub const MAX_LOOKUPS: usize = 4;
/// How long a lookup may take before what was found before is used.
const SLOW: Duration = Duration::from_secs(1);
/// Names that are remembered.
const MAX_NAMES: usize = 256;

/// Looks up names. Cheap to clone; clones share everything.
#[derive(Clone)]
pub struct Resolver {
    shared: Arc<Shared>,
}

struct Shared {
    lookups: Arc<Semaphore>,
    known: Mutex<HashMap<String, Vec<SocketAddr>>>,
    system: fn(&str) -> io::Result<Vec<SocketAddr>>,
}

impl fmt::Debug for Resolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Resolver")
    }
}

impl Default for Resolver {
    fn default() -> Resolver {
        Resolver::with(|name| Ok((name, 0).to_socket_addrs()?.collect()))
    }
}

impl Resolver {
    fn with(system: fn(&str) -> io::Result<Vec<SocketAddr>>) -> Resolver {
        let lookups = Arc::new(Semaphore::new(MAX_LOOKUPS));
        Resolver { shared: Arc::new(Shared { lookups, known: Mutex::default(), system }) }
    }

    async fn addresses(&self, name: &str) -> io::Result<Vec<SocketAddr>> {
        let shared = &self.shared;
        let known = shared.known().get(name).cloned();
        let lookup = shared.clone().look_up(name.to_owned());
        match known {
            None => lookup.await,
            Some(known) => match tokio::time::timeout(SLOW, lookup).await {
                Ok(Ok(found)) => Ok(found),
                Ok(Err(_)) | Err(_) => {
                    log::debug!("{name}: not resolved; using the addresses found before");
                    Ok(known)
                }
            },
        }
    }
}

impl Shared {
    fn known(&self) -> std::sync::MutexGuard<'_, HashMap<String, Vec<SocketAddr>>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// If the caller goes away, the thread keeps its permit until the system returns.
    async fn look_up(self: Arc<Self>, name: String) -> io::Result<Vec<SocketAddr>> {
        let permit = self.lookups.clone().acquire_owned().await.map_err(io::Error::other)?;
        let thread = tokio::task::spawn_blocking(move || {
            let found = (self.system)(&name)?;
            drop(permit);
            let mut known = self.known();
            if known.len() >= MAX_NAMES {
                known.clear();
            }
            known.insert(name, found.clone());
            Ok(found)
        });
        thread.await.map_err(io::Error::other)?
    }
}

impl Resolve for Resolver {
    fn resolve(&self, name: Name) -> Resolving {
        let resolver = self.clone();
        Box::pin(async move {
            let addresses = resolver.addresses(name.as_str()).await?;
            Ok(Box::new(addresses.into_iter()) as Addrs)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Condvar;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Calls that are in the resolver now, the most so far, and whether it answers.
    static NOW: AtomicUsize = AtomicUsize::new(0);
    static MOST: AtomicUsize = AtomicUsize::new(0);
    static HANGS: (Mutex<bool>, Condvar) = (Mutex::new(false), Condvar::new());

    fn system(name: &str) -> io::Result<Vec<SocketAddr>> {
        MOST.fetch_max(NOW.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        let hangs = HANGS.0.lock().unwrap();
        drop(HANGS.1.wait_while(hangs, |hangs| *hangs).unwrap());
        NOW.fetch_sub(1, Ordering::SeqCst);
        match name {
            "good" => Ok(vec![SocketAddr::from(([127, 0, 0, 1], 0))]),
            _ => Err(io::ErrorKind::NotFound.into()),
        }
    }

    #[tokio::test]
    async fn a_resolver_that_hangs_takes_few_threads_and_no_name_that_was_known() {
        let resolver = Resolver::with(system);
        resolver.addresses("good").await.unwrap();
        resolver.addresses("bad").await.unwrap_err();
        *HANGS.0.lock().unwrap() = true;
        let waiting: Vec<_> = (0..64)
            .map(|i| {
                let resolver = resolver.clone();
                tokio::spawn(async move { resolver.addresses(&format!("bad{i}")).await })
            })
            .collect();
        let found = resolver.addresses("good").await.unwrap();
        assert_eq!(found, [SocketAddr::from(([127, 0, 0, 1], 0))]);
        assert_eq!(MOST.load(Ordering::SeqCst), MAX_LOOKUPS);
        *HANGS.0.lock().unwrap() = false;
        HANGS.1.notify_all();
        for lookup in waiting {
            lookup.await.unwrap().unwrap_err();
        }
        assert!(MOST.load(Ordering::SeqCst) <= MAX_LOOKUPS);
    }
}
