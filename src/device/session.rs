//! A connection: what one VMM has told us, from its first message to the moment it is gone.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::{ArcSwap, ArcSwapOption};
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    FrontendReq, VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags,
    VhostUserInflight, VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures,
    VhostUserShMemConfig, VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVirtioFeatures,
    VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    Backend, BackendReqHandler, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut,
};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};

use super::counters::{Complaint, Complaints, count};
use super::held::Inbox;
use super::helper::Places;
use super::inflight::{self, Inflight, InflightError, Shape};
use super::intake::{Arrival, Header, Intake};
use super::memory::{Memory, MemoryError, Placement};
use super::queue::{Kick, Shared};
use super::ring::{Addresses, MAX_SIZE, Ring};
use super::shmem::Shmem;
use super::state::{State, Transfer};
use super::stop::Stop;
use super::{Device, DeviceConfig, Serve};
use crate::fuse::SharedMemory;

/// Room for the tag in the configuration space, in bytes.
///
/// Source: Linux `struct virtio_fs_config`.
pub(super) const TAG_LEN: usize = 36;

/// Length of the configuration space in bytes: tag, le32 number of request queues, le32 size of
/// notification buffers (0: we have no notification queue).
const CONFIG_LEN: usize = TAG_LEN + 4 + 4;

/// Where the number of request queues is in it.
const QUEUES: Range<usize> = TAG_LEN..TAG_LEN + 4;

/// How long the threads of a connection that has ended are waited for.
const END_LIMIT: Duration = Duration::from_millis(300);

const FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// Protocol features we offer, some only with a DAX window or with memory slots. `REPLY_ACK` is the
/// `vhost` crate's work.
fn protocol_features(config: &DeviceConfig) -> VhostUserProtocolFeatures {
    let mut features = VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::BACKEND_REQ
        | VhostUserProtocolFeatures::RESET_DEVICE
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD
        | VhostUserProtocolFeatures::DEVICE_STATE;
    if config.window.is_some() {
        features |= VhostUserProtocolFeatures::SHMEM | VhostUserProtocolFeatures::BACKEND_SEND_FD;
    }
    if config.memory_slots {
        features |= VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
    }
    features
}

/// Serves a VMM until it goes, the connection breaks, or `stop` is raised. When this returns,
/// nothing of the connection is left.
pub(super) fn run<S: Serve>(device: &Device<S>, stream: UnixStream, stop: &Stop) {
    let session = match Session::new(device) {
        Ok(session) => Arc::new(Mutex::new(session)),
        Err(e) => return log::error!("vhost-user: setting up a connection: {e}"),
    };
    log::info!("vhost-user: a VMM has connected");
    let end = converse(device, stream, stop, &session);
    session.lock().unwrap_or_else(PoisonError::into_inner).end();
    match end {
        Ok(why) => log::info!("vhost-user: {why}; the connection is closed"),
        Err(e) => log::warn!("vhost-user: the connection broke: {e}"),
    }
}

/// Takes messages until there are no more; returns why.
fn converse<S: Serve>(
    device: &Device<S>,
    stream: UnixStream,
    stop: &Stop,
    session: &Arc<Mutex<Session<S>>>,
) -> io::Result<&'static str> {
    let mut intake = Intake::new(stream.try_clone()?, stop)?;
    let mut handler = BackendReqHandler::from_stream(stream, Arc::clone(session));
    let complaints = Complaints::default();
    loop {
        let header = match intake.next(stop)? {
            Arrival::Message(header) => header,
            Arrival::Gone => return Ok("the VMM has disconnected"),
            Arrival::Stopped => return Ok("we are to end"),
            Arrival::Broken(why) => return Err(io::Error::new(io::ErrorKind::InvalidData, why)),
        };
        let (error, answered) = if header.request().is_some() {
            match handler.handle_request() {
                Ok(()) => continue,
                Err(e) if is_fatal(header, &e) => return Err(io::Error::other(e)),
                Err(e) => {
                    let answered = was_answered(header, &e);
                    (e.to_string(), answered)
                }
            }
        } else {
            intake.skip(header)?;
            ("not supported".to_owned(), false)
        };
        count(&device.counters.bad_messages_total);
        let number = header.number();
        if complaints.first(Complaint::Message) {
            log::warn!("vhost-user: message {number} refused: {error}; more are only counted");
        } else {
            log::debug!("vhost-user: message {number} refused: {error}");
        }
        let acks = || session.lock().unwrap_or_else(PoisonError::into_inner).acks();
        if !answered && header.needs_reply() && acks() {
            intake.refuse(header)?;
        }
    }
}

/// Whether a connection is of no use after this error.
fn is_fatal(header: Header, error: &Error) -> bool {
    match error {
        Error::Disconnected
        | Error::PartialMessage
        | Error::OversizedMsg
        | Error::SocketBroken(_)
        | Error::SocketError(_)
        | Error::SocketRetry(_) => true,
        // The crate may have left the body unread.
        Error::InvalidMessage => header.has_stray_files(),
        _ => false,
    }
}

/// Whether the `vhost` crate has answered a message that failed: it has if the failure is ours
/// (all of ours are `ReqHandlerError`), and for a few messages if it is its own.
fn was_answered(header: Header, error: &Error) -> bool {
    use FrontendReq as R;
    match error {
        Error::ReqHandlerError(_) => true,
        Error::InactiveOperation(_) => false,
        _ => matches!(
            header.request(),
            Some(R::SET_MEM_TABLE | R::SET_CONFIG | R::SET_BACKEND_REQ_FD | R::GPU_SET_SOCKET)
        ),
    }
}

/// A refusal of ours.
fn refused(why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::ReqHandlerError(io::Error::new(io::ErrorKind::InvalidInput, why))
}

impl From<MemoryError> for Error {
    fn from(e: MemoryError) -> Error {
        refused(e)
    }
}

impl From<InflightError> for Error {
    fn from(e: InflightError) -> Error {
        refused(e)
    }
}

/// What a VMM has told us.
struct Session<S: Serve> {
    config: [u8; CONFIG_LEN],
    /// The last ring that the VMM gave a call descriptor; 0 is the one for urgent requests.
    named: u32,
    /// Protocol features that were offered.
    offered: VhostUserProtocolFeatures,
    service: Arc<S>,
    memory: Arc<ArcSwap<Memory>>,
    rings: Vec<Ring<S>>,
    features: u64,
    protocol_features: u64,
    shmem: Option<Arc<Shmem>>,
    /// A state that is being saved or loaded.
    transfer: Option<Transfer>,
    /// The channel for requests to the VMM, where there is no `shmem` for it. A VMM that has opened
    /// it complains when it is closed early.
    _backend_channel: Option<Backend>,
}

impl<S: Serve> Session<S> {
    fn new(device: &Device<S>) -> io::Result<Session<S>> {
        let shmem = device.config.window.map(Shmem::new).map(Arc::new);
        let memory = shmem.clone().map(|shmem| shmem as Arc<dyn SharedMemory>);
        let service = Arc::new((device.service)(memory));
        let memory = Arc::new(ArcSwap::from_pointee(Memory::default()));
        let complaints = Arc::new(Complaints::default());
        let queues = device.config.request_queues + 1;
        let inboxes: Arc<[_]> =
            (0..queues).map(|_| Inbox::new().map(Arc::new)).collect::<io::Result<_>>()?;
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let helpers = Arc::new(Places::new(processors));
        let ring = |index| {
            Ring::new(Arc::new(Shared {
                index,
                service: Arc::clone(&service),
                memory: Arc::clone(&memory),
                inboxes: Arc::clone(&inboxes),
                call: ArcSwapOption::empty(),
                err: ArcSwapOption::empty(),
                counters: Arc::clone(&device.counters),
                complaints: Arc::clone(&complaints),
                runtime: device.runtime.clone(),
                busy_poll: device.config.busy_poll,
                helpers: Arc::clone(&helpers),
            }))
        };
        Ok(Session {
            config: config_space(&device.config),
            named: 0,
            offered: protocol_features(&device.config),
            rings: (0..queues).map(ring).collect(),
            service,
            memory,
            features: 0,
            protocol_features: 0,
            shmem,
            transfer: None,
            _backend_channel: None,
        })
    }

    /// Whether the front end may ask for answers.
    fn acks(&self) -> bool {
        self.protocol_features & VhostUserProtocolFeatures::REPLY_ACK.bits() != 0
    }

    /// The shape of a buffer for requests in flight.
    fn shape(&self, buffer: &VhostUserInflight) -> std::result::Result<Shape, InflightError> {
        let (queues, size, max) = (buffer.num_queues, buffer.queue_size, self.rings.len());
        if usize::from(queues) > max || size > MAX_SIZE {
            return Err(InflightError::Shape { queues, size, max });
        }
        Ok(Shape { queues, size })
    }

    fn ring(&mut self, index: u32) -> Result<&mut Ring<S>> {
        let count = self.rings.len();
        usize::try_from(index)
            .ok()
            .and_then(|i| self.rings.get_mut(i))
            .ok_or_else(|| refused(format!("queue {index} of {count}")))
    }

    /// Changes one ring and starts it if it can work now.
    fn with_ring(&mut self, index: u32, change: impl FnOnce(&mut Ring<S>)) -> Result<()> {
        let event_idx = self.features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let ring = self.ring(index)?;
        let worked = ring.is_working();
        change(ring);
        ring.start(event_idx);
        if !worked && ring.is_working() {
            self.set_started(true);
        }
        Ok(())
    }

    /// Whether the VMM may be asked to map something.
    fn set_started(&self, started: bool) {
        if let Some(shmem) = &self.shmem {
            shmem.set_started(started);
        }
    }

    /// Makes a new memory table the current one.
    fn set_memory(&mut self, memory: Memory) {
        self.memory.store(Arc::new(memory));
        let event_idx = self.features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let mut started = false;
        for ring in &mut self.rings {
            if ring.is_working() {
                // It may have been without memory and asleep.
                ring.shared().inbox().wake();
            } else {
                ring.start(event_idx);
                started |= ring.is_working();
            }
        }
        if started {
            self.set_started(true);
        }
    }

    /// What another process needs to go on from here. All rings must stand still.
    fn state(&self) -> io::Result<State> {
        if self.rings.iter().any(Ring::is_working) {
            return Err(io::Error::other("a queue is still working"));
        }
        let agreed = self.service.agreed();
        if agreed != 0
            && let Some(ties) = self.service.ties()
        {
            return Err(io::Error::other(ties));
        }
        Ok(State { agreed, rings: self.rings.iter().filter_map(Ring::held).collect() })
    }

    /// Goes on from the state of another process.
    fn load(&mut self, state: State) -> std::result::Result<(), &'static str> {
        if self.rings.iter().any(Ring::is_working) {
            return Err("a queue is working already");
        }
        if state.agreed != 0 {
            self.service.resume(state.agreed)?;
        }
        for held in state.rings {
            let ring = self.rings.get_mut(usize::from(held.index));
            ring.ok_or("it holds requests of a queue that is not here")?.set_before(held);
        }
        Ok(())
    }

    /// Ends all threads and lets go of everything.
    fn end(&mut self) {
        if let Some(shmem) = &self.shmem {
            shmem.end();
        }
        for ring in &self.rings {
            ring.ask_to_halt();
        }
        let deadline = Instant::now() + END_LIMIT;
        for ring in &mut self.rings {
            ring.halt_until(deadline);
        }
        self.rings.clear();
        self.memory.store(Arc::default());
    }
}

fn config_space(config: &DeviceConfig) -> [u8; CONFIG_LEN] {
    let mut space = [0; CONFIG_LEN];
    let tag = config.tag.as_bytes();
    space[..tag.len()].copy_from_slice(tag);
    space[QUEUES].copy_from_slice(&u32::from(config.advised_queues).to_le_bytes());
    space
}

fn placement(region: &VhostUserMemoryRegion) -> Placement {
    Placement {
        guest_addr: region.guest_phys_addr,
        len: region.memory_size,
        user_addr: region.user_addr,
        file_offset: region.mmap_offset,
    }
}

impl<S: Serve> VhostUserBackendReqHandlerMut for Session<S> {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    /// Deprecated: ends all rings, like `reset_device`.
    fn reset_owner(&mut self) -> Result<()> {
        self.reset_device()
    }

    fn reset_device(&mut self) -> Result<()> {
        self.set_started(false);
        self.rings.iter_mut().for_each(Ring::reset);
        self.features = 0;
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(FEATURES)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let unknown = features & !FEATURES;
        if unknown != 0 {
            return Err(refused(format!("features {unknown:#x} were not offered")));
        }
        self.features = features;
        if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            // Without protocol features there is no message to enable a ring.
            for index in 0..self.rings.len() {
                let event_idx = features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
                self.rings[index].set_enabled(true);
                self.rings[index].start(event_idx);
            }
            if self.rings.iter().any(Ring::is_working) {
                self.set_started(true);
            }
        }
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(self.offered)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let unknown = features & !self.offered.bits();
        if unknown != 0 {
            return Err(refused(format!("protocol features {unknown:#x} were not offered")));
        }
        self.protocol_features = features;
        if let Some(shmem) = &self.shmem {
            let needed = VhostUserProtocolFeatures::SHMEM
                | VhostUserProtocolFeatures::BACKEND_REQ
                | VhostUserProtocolFeatures::BACKEND_SEND_FD
                | VhostUserProtocolFeatures::REPLY_ACK;
            shmem.set_negotiated(features & needed.bits() == needed.bits());
        }
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.rings.len() as u64)
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(Memory::MAX_REGIONS as u64)
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let table = regions.iter().map(placement).zip(files);
        let memory = self.memory.load().replaced(table)?;
        self.set_memory(memory);
        Ok(None)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        let memory = self.memory.load().with(placement(region), file)?;
        self.set_memory(memory);
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let memory = self.memory.load().without(placement(region))?;
        self.set_memory(memory);
        Ok(())
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let mut fits = false;
        self.with_ring(index, |ring| fits = ring.set_size(num))?;
        if fits { Ok(()) } else { Err(refused(format!("queue {index} cannot have size {num}"))) }
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let addresses = Addresses { descriptors: descriptor, available, used };
        self.with_ring(index, |ring| ring.set_addresses(addresses))
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let base =
            u16::try_from(base).map_err(|_| refused(format!("queue {index}: base {base}")))?;
        self.with_ring(index, |ring| ring.set_base(base))
    }

    /// Stops a ring. A ring that does not exist stands at 0: without an answer the front end would
    /// wait for ever.
    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        self.set_started(false);
        let base = self.ring(index).map_or(0, Ring::stop);
        Ok(VhostUserVringState::new(index, u32::from(base)))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let kick = file.map_or(Kick::Polling, |file| Kick::Fd(Arc::new(file)));
        self.with_ring(u32::from(index), |ring| ring.set_kick(kick))
    }

    /// QEMU does this for all queues that a device has before a driver asks how many to use.
    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let index = u32::from(index);
        self.with_ring(index, |ring| {
            ring.shared().call.store(file.map(Arc::new));
            if ring.is_working() {
                // An answer may have been announced on the old descriptor only.
                ring.shared().signal();
            }
        })?;
        self.named = self.named.max(index);
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let ring = self.ring(u32::from(index))?;
        ring.shared().err.store(file.map(Arc::new));
        Ok(())
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        if !enable {
            self.set_started(false);
        }
        self.with_ring(index, |ring| ring.set_enabled(enable))
    }

    /// Bytes past the configuration space are 0. The number of request queues is the VMM's own, if it
    /// has set some up: Linux takes no device that lacks one of them.
    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> Result<Vec<u8>> {
        let mut space = self.config;
        if self.named > 0 {
            space[QUEUES].copy_from_slice(&self.named.to_le_bytes());
        }
        let byte = |i: u32| {
            let place = usize::try_from(i).ok();
            place.and_then(|i| space.get(i)).copied().unwrap_or(0)
        };
        Ok((offset..offset.saturating_add(size)).map(byte).collect())
    }

    /// Nothing in the configuration space can be written; that a driver tried is no harm.
    fn set_config(&mut self, _: u32, _: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        Ok(())
    }

    fn set_backend_req_fd(&mut self, backend: Backend) {
        match &self.shmem {
            Some(shmem) => shmem.set_channel(backend),
            None => self._backend_channel = Some(backend),
        }
    }

    fn set_gpu_socket(&mut self, _: GpuBackend) -> Result<()> {
        Err(unsupported())
    }

    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> Result<File> {
        Err(unsupported())
    }

    /// A buffer of 0 bytes for what cannot be: without an answer the front end would wait for ever.
    fn get_inflight_fd(&mut self, want: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let made = self.shape(want).and_then(inflight::create);
        let (file, len) = match made {
            Ok(made) => made,
            Err(e) => {
                log::warn!("vhost-user: requests in flight are not recorded: {e}");
                (File::open("/dev/null").map_err(Error::ReqHandlerError)?, 0)
            }
        };
        Ok((VhostUserInflight { mmap_size: len, mmap_offset: 0, ..*want }, file))
    }

    fn set_inflight_fd(&mut self, buffer: &VhostUserInflight, file: File) -> Result<()> {
        let shape = self.shape(buffer)?;
        let inflight = Inflight::open(file, buffer.mmap_offset, buffer.mmap_size, shape)?;
        let inflight = Arc::new(inflight);
        if inflight.agreed() != 0 && self.service.agreed() == 0 {
            match self.service.resume(inflight.agreed()) {
                Ok(()) => log::info!("vhost-user: the guest's session goes on"),
                Err(why) => log::error!("vhost-user: the guest's session cannot go on: {why}"),
            }
        }
        for index in 0..self.rings.len() {
            let inflight = Arc::clone(&inflight);
            let index = u32::try_from(index).map_err(refused)?;
            self.with_ring(index, |ring| ring.set_inflight(inflight))?;
        }
        Ok(())
    }

    fn set_device_state_fd(
        &mut self,
        direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        file: File,
    ) -> Result<Option<File>> {
        let begun = match direction {
            VhostTransferStateDirection::SAVE => {
                self.state().and_then(|state| Transfer::save(&state, file))
            }
            VhostTransferStateDirection::LOAD => Transfer::load(file),
        };
        match begun {
            Ok(transfer) => self.transfer = Some(transfer),
            Err(e) => {
                log::error!("vhost-user: the device's state cannot be moved: {e}");
                return Err(Error::ReqHandlerError(e));
            }
        }
        Ok(None)
    }

    /// Ends a transfer and takes over what was loaded.
    fn check_device_state(&mut self) -> Result<()> {
        let transfer = self.transfer.take().ok_or_else(|| refused("no state was moved"))?;
        let moved = transfer.finish().and_then(|state| match state {
            Some(state) => self.load(state).map_err(io::Error::other),
            None => Ok(()),
        });
        moved.map_err(|e| {
            log::error!("vhost-user: moving the device's state: {e}");
            Error::ReqHandlerError(e)
        })
    }

    /// Region 0 is the DAX window. Without one drivers read through the queues.
    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Ok(match &self.shmem {
            Some(shmem) => VhostUserShMemConfig::new(1, &[shmem.size()]),
            None => VhostUserShMemConfig::default(),
        })
    }

    fn set_log_base(&mut self, _: &VhostUserLog, _: File) -> Result<()> {
        Err(unsupported())
    }
}

/// For messages of features that we do not offer.
fn unsupported() -> Error {
    Error::ReqHandlerError(io::ErrorKind::Unsupported.into())
}
