//! The FUSE server as what answers a device's requests.

use std::sync::Arc;

use tokio::runtime::Handle;
use vm_memory::VolatileSlice;

use super::{Device, DeviceConfig, DeviceError, Outcome, Serve, Wait};
use crate::fuse::{
    self, DaxOptions, Mounts, Pins, Reply, Request, RequestError, Server, ServerOptions,
};

impl Device<Server> {
    /// A device that shows `mounts`. Every VMM that connects gets a server, and so a session, of its
    /// own; waits for chunks run on `runtime`.
    pub fn new(
        config: DeviceConfig,
        mounts: Arc<Mounts>,
        options: ServerOptions,
        dax: DaxOptions,
        runtime: Handle,
    ) -> Result<Device<Server>, DeviceError> {
        let counters = Arc::clone(mounts.dax_counters());
        Device::with_service(config, runtime, move |window| {
            let server = Server::new(Arc::clone(&mounts), options);
            match window {
                Some(window) => server.with_window(window, dax, Arc::clone(&counters)),
                None => server,
            }
        })
    }
}

impl Serve for Server {
    type Request = Request;
    type Pins = Pins;

    const MAX_REQUEST_LEN: usize = Request::MAX_LEN;

    fn enter(&self, queue: u16) {
        fuse::serve_queue(queue.into());
    }

    fn agreed(&self) -> u64 {
        Server::agreed(self)
    }

    fn ties(&self) -> Option<String> {
        Server::ties(self)
    }

    fn resume(&self, agreed: u64) -> Result<(), &'static str> {
        Server::resume(self, agreed)
    }

    fn parse(&self, bytes: &[u8]) -> Result<Request, i32> {
        Request::parse(bytes).map_err(|e| e.errno())
    }

    fn unique(request: &Request) -> u64 {
        request.header.unique
    }

    fn subject(request: &Request) -> (u64, u32) {
        (request.header.nodeid, request.header.opcode)
    }

    fn handle(&self, request: &Request, reply: &[VolatileSlice<'_>], pins: &Pins) -> Outcome<Pins> {
        match Server::handle(self, request, &mut Reply::new(reply), pins) {
            fuse::Outcome::Reply(len) => Outcome::Reply(len),
            fuse::Outcome::NoReply => Outcome::NoReply,
            fuse::Outcome::Wait(wait) => {
                let interruptible = wait.interruptible();
                Outcome::Wait(Wait { work: Box::pin(wait.ready()), interruptible })
            }
            fuse::Outcome::Interrupt(unique) => Outcome::Interrupt(unique),
        }
    }

    fn error(&self, unique: u64, errno: i32, reply: &[VolatileSlice<'_>]) -> u32 {
        Server::error(unique, errno, &mut Reply::new(reply))
    }

    fn refuse(&self, bytes: &[u8], errno: i32, reply: &[VolatileSlice<'_>]) -> u32 {
        // Whatever else is wrong with the bytes, the id is where it always is.
        let unique = match Request::parse(bytes) {
            Ok(request) => Some(request.header.unique),
            Err(e) => RequestError::unique(&e),
        };
        unique.map_or(0, |unique| Server::error(unique, errno, &mut Reply::new(reply)))
    }
}
