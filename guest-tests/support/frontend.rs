//! The VMM's side of vhost-user: connects, shakes hands as each VMM does, owns memory and queues.
//!
//! A handshake is a list of [`Step`]s, so that a test can stop in the middle of it, repeat one or
//! put them in an order of its own. Messages that the `vhost` crate refuses to send go out through
//! [`Vm::send_raw`]. Every exchange ends: a watchdog closes the socket when the back end does not
//! answer within [`CONTROL_TIMEOUT`], and the call reports it.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use vhost::vhost_user::message::{
    FrontendReq, VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags,
    VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VringConfigData};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::fuse_client::Fuse;
use super::memory::{GuestMemory, Layout, MIB, Region};
use super::virtqueue::{Rings, Virtqueue};
use super::window::{Takes, Window};
use super::{to_u32, to_usize};

/// How long a back end may take to answer a message, or to listen, on a machine that is busy.
pub const CONTROL_TIMEOUT: Duration = Duration::from_secs(60);

pub const F_INDIRECT_DESC: u64 = 1 << 28;
pub const F_EVENT_IDX: u64 = 1 << 29;
pub const F_PROTOCOL_FEATURES: u64 = 1 << 30;
pub const F_VERSION_1: u64 = 1 << 32;

/// Bytes of `struct virtio_fs_config`: the tag, NUL-padded, and `num_request_queues`.
pub const CONFIG_SPACE: usize = 36 + 4;

/// Whose order of messages and choice of features to follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vmm {
    /// QEMU `vhost-user-fs-pci`: MQ mandatory, memory slots one by one where offered.
    Qemu,
    /// cloud-hypervisor `--fs`: NEED_REPLY on everything.
    CloudHypervisor,
    /// crosvm `--vhost-user type=fs`: tag and queue count from the back end.
    Crosvm,
    /// Dragonball: call eventfds before there is memory, features set twice over.
    Dragonball,
    /// User-mode Linux: no MQ, tag from the back end.
    Uml,
}

impl Vmm {
    pub const ALL: [Vmm; 5] =
        [Vmm::Qemu, Vmm::CloudHypervisor, Vmm::Crosvm, Vmm::Dragonball, Vmm::Uml];

    fn wanted_protocol(self) -> VhostUserProtocolFeatures {
        use VhostUserProtocolFeatures as P;
        match self {
            Vmm::Qemu => {
                P::MQ | P::REPLY_ACK | P::CONFIGURE_MEM_SLOTS | P::BACKEND_REQ | P::RESET_DEVICE
            }
            Vmm::CloudHypervisor => {
                P::MQ | P::REPLY_ACK | P::CONFIGURE_MEM_SLOTS | P::INFLIGHT_SHMFD | P::DEVICE_STATE
            }
            Vmm::Crosvm => P::MQ | P::REPLY_ACK | P::CONFIG | P::BACKEND_REQ,
            Vmm::Dragonball => P::MQ | P::REPLY_ACK,
            Vmm::Uml => P::REPLY_ACK | P::CONFIG | P::BACKEND_REQ,
        }
    }

    /// The messages up to the first request on a queue, for `queues` queues.
    pub fn handshake(self, queues: usize) -> Vec<Step> {
        use Step::*;
        let each = |steps: &[fn(usize) -> Step]| -> Vec<Step> {
            (0..queues).flat_map(|q| steps.iter().map(move |s| s(q))).collect()
        };
        let mut steps = Vec::new();
        match self {
            Vmm::Qemu => {
                steps.extend([
                    GetFeatures,
                    GetProtocolFeatures,
                    SetProtocolFeatures,
                    GetQueueNum,
                    GetMaxMemSlots,
                    SetBackendReqFd,
                    SetOwner,
                    GetFeatures,
                ]);
                steps.extend(each(&[Call, Err]));
                steps.extend([SetFeatures, NeedReply(true), Memory, NeedReply(false)]);
                steps.extend(each(&[Num, Base, Addr, Kick, Call]));
                steps.push(NeedReply(true));
                steps.extend(each(&[Enable]));
                steps.push(NeedReply(false));
            }
            Vmm::CloudHypervisor => {
                steps.extend([
                    SetOwner,
                    GetFeatures,
                    GetProtocolFeatures,
                    SetProtocolFeatures,
                    NeedReply(true),
                    GetQueueNum,
                    GetMaxMemSlots,
                    SetFeatures,
                    MemoryTable,
                ]);
                steps.extend(each(&[Num]));
                steps.push(Inflight);
                steps.extend(each(&[Addr, Base, Call, Kick]));
                steps.extend(each(&[Enable]));
            }
            Vmm::Crosvm => {
                steps.extend([
                    SetOwner,
                    GetFeatures,
                    SetFeatures,
                    GetProtocolFeatures,
                    SetProtocolFeatures,
                    SetBackendReqFd,
                    GetQueueNum,
                    GetConfig,
                    SetFeatures,
                    MemoryTable,
                ]);
                steps.extend(each(&[Num, Addr, Base, Call, Kick, Enable]));
            }
            Vmm::Dragonball => {
                steps.extend([
                    GetFeatures,
                    SetOwner,
                    GetFeatures,
                    SetFeatures,
                    GetProtocolFeatures,
                    SetProtocolFeatures,
                    GetQueueNum,
                ]);
                steps.extend(each(&[Call]));
                steps.push(MemoryTable);
                steps.extend(each(&[Num, Base, Addr, Kick, Call]));
                steps.extend(each(&[Enable]));
            }
            Vmm::Uml => {
                steps.extend([
                    SetOwner,
                    GetFeatures,
                    GetProtocolFeatures,
                    SetProtocolFeatures,
                    NeedReply(true),
                    SetBackendReqFd,
                    GetConfig,
                    SetFeatures,
                    MemoryTable,
                ]);
                steps.extend(each(&[Call, Num, Base, Addr]));
                steps.extend(each(&[Kick, Enable]));
            }
        }
        steps
    }
}

/// One message of a handshake. What the other side did not offer is skipped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    GetFeatures,
    SetFeatures,
    SetOwner,
    GetProtocolFeatures,
    SetProtocolFeatures,
    GetQueueNum,
    GetMaxMemSlots,
    SetBackendReqFd,
    GetConfig,
    /// ADD_MEM_REG for each region where slots were negotiated, otherwise SET_MEM_TABLE.
    Memory,
    /// SET_MEM_TABLE, always.
    MemoryTable,
    /// GET_INFLIGHT_FD and SET_INFLIGHT_FD.
    Inflight,
    /// From here on, ask for an acknowledgement of every message, or stop asking.
    NeedReply(bool),
    Num(usize),
    Base(usize),
    Addr(usize),
    Kick(usize),
    Call(usize),
    Err(usize),
    Enable(usize),
    Disable(usize),
}

#[derive(Clone, Debug)]
pub struct VmConfig {
    pub vmm: Vmm,
    pub memory: Layout,
    /// Request queues; the hiprio queue comes on top.
    pub request_queues: usize,
    pub queue_size: u16,
    /// Size of the hiprio queue, if another.
    pub hiprio_size: Option<u16>,
    pub indirect: bool,
    pub event_idx: bool,
    /// What is done with a DAX window, if the back end has one; none: it is not asked for.
    pub window: Option<Takes>,
}

impl Default for VmConfig {
    fn default() -> VmConfig {
        VmConfig {
            vmm: Vmm::Qemu,
            memory: Layout::flat(1024 * MIB),
            request_queues: 1,
            queue_size: 1024,
            hiprio_size: None,
            indirect: true,
            event_idx: true,
            window: None,
        }
    }
}

/// A guest as the back end sees it. Dropping it closes the connection without a word, as a VMM that
/// was killed does; [`Vm::stop`] first for a clean end.
pub struct Vm {
    pub config: VmConfig,
    pub memory: GuestMemory,
    pub offered: u64,
    pub features: u64,
    pub protocol: VhostUserProtocolFeatures,
    /// Answer of GET_QUEUE_NUM, if it was asked.
    pub queue_num: Option<u64>,
    /// Answer of GET_MAX_MEM_SLOTS, if it was asked.
    pub mem_slots: Option<u64>,
    /// Answer of GET_CONFIG, if it was asked.
    pub config_space: Option<Vec<u8>>,
    pub rings: Vec<Rings>,
    /// Next index SET_VRING_BASE tells, per queue.
    pub bases: Vec<u16>,
    queues: Vec<Option<Virtqueue>>,
    front: Frontend,
    socket: UnixStream,
    watchdog: Watchdog,
    /// The front end's end of the back end's request channel: kept open, never read.
    backend_channel: Option<UnixStream>,
    /// The record of requests in flight, as the back end described it.
    inflight: Option<(VhostUserInflight, std::fs::File)>,
    need_reply: bool,
    window: Option<Arc<Window>>,
    /// This is not the first back end of the guest.
    reborn: bool,
}

impl Vm {
    /// Connects and shakes hands to the end: the queues are running.
    pub fn boot(socket: &Path, config: VmConfig) -> Result<Vm> {
        let mut vm = Vm::connect(socket, config)?;
        for step in vm.handshake() {
            vm.step(step)?;
        }
        Ok(vm)
    }

    /// A guest that has mounted the share: after INIT.
    pub fn mounted(socket: &Path) -> (Vm, Fuse) {
        let mut vm = Vm::boot(socket, VmConfig::default()).expect("a guest boots");
        let mut fuse = vm.fuse(1);
        fuse.init().expect("INIT");
        (vm, fuse)
    }

    /// Connects only.
    pub fn connect(socket: &Path, config: VmConfig) -> Result<Vm> {
        Vm::over(dial(socket)?, config)
    }

    pub fn over(stream: UnixStream, config: VmConfig) -> Result<Vm> {
        let memory = GuestMemory::new(&config.memory)?;
        let queues = config.request_queues + 1;
        let rings = (0..queues)
            .map(|q| {
                let size = match config.hiprio_size {
                    Some(size) if q == 0 => size,
                    _ => config.queue_size,
                };
                Rings::new(&memory, size)
            })
            .collect::<io::Result<Vec<_>>>()?;
        let socket = stream.try_clone()?;
        let watchdog = Watchdog::new(stream.try_clone()?);
        let front = Frontend::from_stream(stream, queues as u64);
        Ok(Vm {
            memory,
            offered: 0,
            features: 0,
            protocol: VhostUserProtocolFeatures::empty(),
            queue_num: None,
            mem_slots: None,
            config_space: None,
            bases: vec![0; queues],
            queues: rings.iter().map(|_| None).collect(),
            rings,
            front,
            socket,
            watchdog,
            backend_channel: None,
            inflight: None,
            need_reply: false,
            window: None,
            reborn: false,
            config,
        })
    }

    /// Goes on with another back end, as cloud-hypervisor does when its own has died: the guest
    /// notices nothing. The record of requests in flight is handed over; rings begin where the
    /// driver stands, which may be ahead of what was taken.
    pub fn reconnect(&mut self, socket: &Path) -> Result<()> {
        self.redial(socket)?;
        for (base, rings) in self.bases.iter_mut().zip(&self.rings) {
            *base = u16::from_le(rings.avail.u16_at(2).load(Ordering::SeqCst));
        }
        for step in self.handshake() {
            self.step(step)?;
        }
        Ok(())
    }

    /// Goes on from a snapshot with another back end, as cloud-hypervisor does: `state` comes first,
    /// protocol features are not asked for, rings begin where [`Vm::stop`] left them.
    pub fn restore(&mut self, socket: &Path, state: &[u8]) -> Result<()> {
        self.redial(socket)?;
        self.inflight = None;
        for step in self.handshake() {
            if step == Step::GetProtocolFeatures {
                continue;
            }
            self.step(step)?;
            if step == Step::SetProtocolFeatures {
                self.load_state(state)?;
            }
        }
        Ok(())
    }

    fn redial(&mut self, socket: &Path) -> Result<()> {
        let stream = dial(socket)?;
        self.socket = stream.try_clone()?;
        self.watchdog = Watchdog::new(stream.try_clone()?);
        self.front = Frontend::from_stream(stream, self.rings.len() as u64);
        self.need_reply = false;
        self.reborn = true;
        Ok(())
    }

    /// SET_DEVICE_STATE_FD(SAVE) and all that comes then.
    pub fn save_state(&mut self) -> Result<Vec<u8>> {
        let _armed = self.watchdog.arm();
        let (mut ours, theirs) = UnixStream::pair()?;
        self.move_state(VhostTransferStateDirection::SAVE, theirs)?;
        let mut state = Vec::new();
        ours.read_to_end(&mut state)?;
        self.front.check_device_state()?;
        Ok(state)
    }

    /// SET_DEVICE_STATE_FD(LOAD) with these bytes.
    pub fn load_state(&mut self, state: &[u8]) -> Result<()> {
        let _armed = self.watchdog.arm();
        let (mut ours, theirs) = UnixStream::pair()?;
        self.move_state(VhostTransferStateDirection::LOAD, theirs)?;
        ours.write_all(state)?;
        drop(ours);
        Ok(self.front.check_device_state()?)
    }

    fn move_state(&mut self, to: VhostTransferStateDirection, by: UnixStream) -> Result<()> {
        let phase = VhostTransferStatePhase::STOPPED;
        self.front.set_device_state_fd(to, phase, by.into())?;
        Ok(())
    }

    pub fn handshake(&self) -> Vec<Step> {
        self.config.vmm.handshake(self.rings.len())
    }

    /// One message and, where there is one, its answer.
    pub fn step(&mut self, step: Step) -> Result<()> {
        let _armed = self.watchdog.arm();
        self.run(step).with_context(|| format!("{step:?}"))
    }

    fn run(&mut self, step: Step) -> Result<()> {
        use VhostUserProtocolFeatures as P;
        match step {
            Step::GetFeatures => self.offered = self.front.get_features()?,
            Step::SetFeatures => {
                let mut wanted = F_VERSION_1 | F_PROTOCOL_FEATURES;
                if self.config.indirect {
                    wanted |= F_INDIRECT_DESC;
                }
                if self.config.event_idx {
                    wanted |= F_EVENT_IDX;
                }
                self.features = wanted & self.offered;
                self.front.set_features(self.features)?;
                self.make_queues();
            }
            Step::SetOwner => self.front.set_owner()?,
            Step::GetProtocolFeatures => {
                let offered = self.front.get_protocol_features()?;
                let mut wanted = self.config.vmm.wanted_protocol();
                if self.config.window.is_some() {
                    wanted |= P::SHMEM | P::BACKEND_REQ | P::BACKEND_SEND_FD | P::REPLY_ACK;
                }
                self.protocol = offered & wanted;
            }
            Step::SetProtocolFeatures => self.front.set_protocol_features(self.protocol)?,
            Step::GetQueueNum => {
                if self.protocol.contains(P::MQ) {
                    let max = self.front.get_queue_num()?;
                    self.queue_num = Some(max);
                    if (self.rings.len() as u64) > max {
                        bail!("{} queues wanted, {max} offered", self.rings.len());
                    }
                }
            }
            Step::GetMaxMemSlots => {
                if self.protocol.contains(P::CONFIGURE_MEM_SLOTS) {
                    self.mem_slots = Some(self.front.get_max_mem_slots()?);
                }
            }
            Step::SetBackendReqFd => {
                if self.protocol.contains(P::SHMEM) {
                    self.open_window()?;
                } else if self.protocol.contains(P::BACKEND_REQ) {
                    let (ours, theirs) = UnixStream::pair()?;
                    self.front.set_backend_request_fd(&theirs)?;
                    self.backend_channel = Some(ours);
                }
            }
            Step::GetConfig => {
                if self.protocol.contains(P::CONFIG) {
                    let space = self.get_config(0, CONFIG_SPACE)?;
                    self.config_space = Some(space);
                }
            }
            Step::Memory if self.protocol.contains(P::CONFIGURE_MEM_SLOTS) => {
                for region in self.memory.regions() {
                    self.front.add_mem_region(&region.info())?;
                }
            }
            Step::Memory | Step::MemoryTable => self.send_memory_table()?,
            Step::Inflight => {
                if self.protocol.contains(P::INFLIGHT_SHMFD) {
                    self.negotiate_inflight()?;
                }
            }
            Step::NeedReply(on) => {
                self.need_reply = on;
                let on = on && self.protocol.contains(P::REPLY_ACK);
                self.front.set_hdr_flags(if on {
                    VhostUserHeaderFlag::NEED_REPLY
                } else {
                    VhostUserHeaderFlag::empty()
                });
            }
            Step::Num(q) => self.front.set_vring_num(q, self.rings[q].size)?,
            Step::Base(q) => self.front.set_vring_base(q, self.bases[q])?,
            Step::Addr(q) => {
                let rings = &self.rings[q];
                let data = VringConfigData {
                    queue_max_size: rings.size,
                    queue_size: rings.size,
                    flags: 0,
                    desc_table_addr: rings.desc.user_addr(),
                    used_ring_addr: rings.used.user_addr(),
                    avail_ring_addr: rings.avail.user_addr(),
                    log_addr: None,
                };
                self.front.set_vring_addr(q, &data)?;
            }
            Step::Kick(q) => self.front.set_vring_kick(q, &self.rings[q].kick)?,
            Step::Call(q) => self.front.set_vring_call(q, &self.rings[q].call)?,
            Step::Err(q) => self.front.set_vring_err(q, &self.rings[q].err)?,
            Step::Enable(q) => self.front.set_vring_enable(q, true)?,
            Step::Disable(q) => self.front.set_vring_enable(q, false)?,
        }
        Ok(())
    }

    /// Driver sides for the features just agreed on; those already taken stay as they are.
    fn make_queues(&mut self) {
        let indirect = self.features & F_INDIRECT_DESC != 0;
        let event_idx = self.features & F_EVENT_IDX != 0;
        if self.reborn {
            // The driver does not know of the new back end.
            return;
        }
        for (queue, rings) in self.queues.iter_mut().zip(&self.rings) {
            *queue = Some(Virtqueue::new(&self.memory, rings.clone(), indirect, event_idx));
        }
    }

    fn negotiate_inflight(&mut self) -> Result<()> {
        if self.inflight.is_none() {
            let queues = u16::try_from(self.rings.len())?;
            let ask = VhostUserInflight::new(0, 0, queues, self.config.queue_size);
            self.inflight = Some(self.front.get_inflight_fd(&ask)?);
        }
        if let Some((buffer, file)) = &self.inflight {
            self.front.set_inflight_fd(buffer, file.as_raw_fd())?;
        }
        Ok(())
    }

    /// GET_SHMEM_CONFIG, and the channel over which the window is filled.
    fn open_window(&mut self) -> Result<()> {
        self.send_raw(FrontendReq::GET_SHMEM_CONFIG.into(), 0x1, &[], &[])?;
        let (_, _, body) = self.recv_raw()?;
        let word = |at: usize, len: usize| {
            body[at..at + len].iter().rev().fold(0, |sum: u64, &byte| sum << 8 | u64::from(byte))
        };
        let (regions, size) = (word(0, 4), word(8, 8));
        if regions != 1 || !size.is_power_of_two() {
            bail!("{regions} regions of shared memory, the first of {size} bytes");
        }
        let takes = self.config.window.context("SHMEM was asked for")?;
        let (window, theirs) = Window::open(size, takes)?;
        // SAFETY: `Window::open` has made it for us.
        let theirs = unsafe { std::os::fd::OwnedFd::from_raw_fd(theirs) };
        self.front.set_backend_request_fd(&theirs)?;
        self.window = Some(window);
        Ok(())
    }

    /// The DAX window, if there is one.
    pub fn window(&self) -> Option<&Arc<Window>> {
        self.window.as_ref()
    }

    fn send_memory_table(&mut self) -> Result<()> {
        let infos: Vec<_> = self.memory.regions().iter().map(|r| r.info()).collect();
        self.front.set_mem_table(&infos)?;
        Ok(())
    }

    /// The driver side of queue `index`; 0 is hiprio. Once per queue.
    pub fn take_queue(&mut self, index: usize) -> Virtqueue {
        self.queues[index].take().expect("SET_FEATURES was sent and the queue is still here")
    }

    /// A FUSE client on queue `index`. Once per queue.
    pub fn fuse(&mut self, index: usize) -> Fuse {
        let queue = self.take_queue(index);
        Fuse::new(&self.memory, queue)
    }

    /// Runs one message with an acknowledgement, as QEMU does for those that concern memory: what
    /// the guest does next must not overtake it.
    fn acknowledged(&mut self, send: impl FnOnce(&mut Vm) -> Result<()>) -> Result<()> {
        let before = self.need_reply;
        self.step(Step::NeedReply(true))?;
        let sent = {
            let _armed = self.watchdog.arm();
            send(self)
        };
        self.step(Step::NeedReply(before))?;
        sent
    }

    /// Makes SET_MEM_TABLE of what `memory` holds now.
    pub fn update_memory_table(&mut self) -> Result<()> {
        self.acknowledged(|vm| vm.run(Step::MemoryTable)).context("SET_MEM_TABLE")
    }

    fn has_slots(&self) -> bool {
        self.protocol.contains(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    }

    /// Memory hot-plug: ADD_MEM_REG, or the whole table where slots were not negotiated.
    pub fn plug(&mut self, guest_addr: u64, len: u64) -> Result<()> {
        let info = self.memory.plug(guest_addr, len)?.info();
        if !self.has_slots() {
            return self.update_memory_table();
        }
        self.acknowledged(|vm| Ok(vm.front.add_mem_region(&info).map(drop)?)).context("ADD_MEM_REG")
    }

    /// Shows to the back end what it has mapped to the window, as guest memory from `guest_addr` on, as
    /// QEMU does: region by region, or in a new table where slots were not negotiated.
    pub fn show_window(&mut self, guest_addr: u64) -> Result<()> {
        let mapped = self.window.as_ref().context("no window")?.regions(guest_addr)?;
        let more = mapped.iter().map(|(info, _)| *info);
        if self.has_slots() {
            for info in more {
                self.acknowledged(|vm| Ok(vm.front.add_mem_region(&info).map(drop)?))
                    .context("ADD_MEM_REG")?;
            }
            return Ok(());
        }
        let infos: Vec<_> = self.memory.regions().iter().map(|r| r.info()).chain(more).collect();
        self.acknowledged(|vm| Ok(vm.front.set_mem_table(&infos).map(drop)?))
            .context("SET_MEM_TABLE")
    }

    /// Hot-unplug of the region at `guest_addr`; its mapping here lives as long as buffers in it.
    pub fn unplug(&mut self, guest_addr: u64) -> Result<Arc<Region>> {
        let region = self.memory.unplug(guest_addr).context("no region there")?;
        if !self.has_slots() {
            self.update_memory_table()?;
            return Ok(region);
        }
        let info = region.info();
        self.acknowledged(|vm| Ok(vm.front.remove_mem_region(&info)?)).context("REM_MEM_REG")?;
        Ok(region)
    }

    pub fn get_config(&mut self, offset: usize, len: usize) -> Result<Vec<u8>> {
        let _armed = self.watchdog.arm();
        let flags = VhostUserConfigFlags::empty();
        let (_, bytes) =
            self.front.get_config(to_u32(offset), to_u32(len), flags, &vec![0; len])?;
        Ok(bytes)
    }

    pub fn set_config(&mut self, offset: usize, bytes: &[u8]) -> Result<()> {
        let _armed = self.watchdog.arm();
        self.front.set_config(to_u32(offset), VhostUserConfigFlags::WRITABLE, bytes)?;
        Ok(())
    }

    pub fn enable(&mut self, queue: usize, on: bool) -> Result<()> {
        self.step(if on { Step::Enable(queue) } else { Step::Disable(queue) })
    }

    /// GET_VRING_BASE: stops the ring and says where it stood.
    pub fn get_base(&mut self, queue: usize) -> Result<u16> {
        let _armed = self.watchdog.arm();
        let base = self.front.get_vring_base(queue).context("GET_VRING_BASE")?;
        let base = u16::try_from(base).context("GET_VRING_BASE answers an index of 16 bits")?;
        self.bases[queue] = base;
        Ok(base)
    }

    /// Stops all rings as QEMU does, and remembers their bases for [`Vm::cont`].
    pub fn stop(&mut self) -> Result<Vec<u16>> {
        for q in 0..self.rings.len() {
            self.enable(q, false)?;
        }
        (0..self.rings.len()).map(|q| self.get_base(q)).collect()
    }

    /// Starts rings stopped by [`Vm::stop`] from where they stood.
    pub fn cont(&mut self) -> Result<()> {
        for q in 0..self.rings.len() {
            for step in [Step::Num(q), Step::Base(q), Step::Addr(q), Step::Kick(q), Step::Call(q)] {
                self.step(step)?;
            }
        }
        for q in 0..self.rings.len() {
            self.enable(q, true)?;
        }
        Ok(())
    }

    /// RESET_DEVICE: every ring is stopped, all device state is gone, the connection stays.
    pub fn reset_device(&mut self) -> Result<()> {
        let _armed = self.watchdog.arm();
        self.front.reset_device()?;
        self.bases.fill(0);
        Ok(())
    }

    pub fn need_reply(&mut self, on: bool) -> Result<()> {
        self.step(Step::NeedReply(on))
    }

    /// Sends any bytes and fds as one message: header as given, body as given.
    pub fn send_raw(&mut self, code: u32, flags: u32, body: &[u8], fds: &[RawFd]) -> Result<()> {
        let header: Vec<u8> =
            [code, flags, to_u32(body.len())].iter().flat_map(|word| word.to_le_bytes()).collect();
        self.send_bytes(&[&header, body], fds)
    }

    /// Sends bytes that need not be a message at all.
    pub fn send_bytes(&mut self, parts: &[&[u8]], fds: &[RawFd]) -> Result<()> {
        let total: usize = parts.iter().map(|p| p.len()).sum();
        let sent = self.socket.send_with_fds(parts, fds)?;
        if sent != total {
            bail!("{sent} of {total} bytes sent");
        }
        Ok(())
    }

    /// Receives one message: `(code, flags, body)`.
    pub fn recv_raw(&mut self) -> Result<(u32, u32, Vec<u8>)> {
        let _armed = self.watchdog.arm();
        let mut header = [0; 12];
        self.socket.read_exact(&mut header)?;
        let word =
            |i: usize| u32::from_le_bytes(header[4 * i..4 * i + 4].try_into().expect("4 bytes"));
        let mut body = vec![0; to_usize(u64::from(word(2)))];
        self.socket.read_exact(&mut body)?;
        Ok((word(0), word(1), body))
    }

    /// A raw message that asks for an acknowledgement; its value (0 is success).
    pub fn ask_ack(&mut self, code: FrontendReq, body: &[u8]) -> Result<u64> {
        self.send_raw(code.into(), 0x1 | 0x8, body, &[])?;
        let (got, flags, body) = self.recv_raw()?;
        if got != u32::from(code) || flags & 0x4 == 0 || body.len() != 8 {
            bail!("code {got}, flags {flags:#x}, {} bytes instead of an ack", body.len());
        }
        Ok(u64::from_le_bytes(body.try_into().expect("8 bytes")))
    }

    /// Whether the back end closed the connection, waiting for it up to `limit`.
    pub fn closed_by_peer(&self, limit: Duration) -> bool {
        let mut fd =
            libc::pollfd { fd: self.socket.as_raw_fd(), events: libc::POLLRDHUP, revents: 0 };
        let ms = libc::c_int::try_from(limit.as_millis()).unwrap_or(libc::c_int::MAX);
        // SAFETY: one pollfd that lives across the call.
        let n = unsafe { libc::poll(&raw mut fd, 1, ms) };
        n == 1 && fd.revents & (libc::POLLRDHUP | libc::POLLHUP | libc::POLLERR) != 0
    }
}

/// Connects. A socket file exists for a moment before its owner listens on it.
fn dial(socket: &Path) -> Result<UnixStream> {
    let deadline = Instant::now() + CONTROL_TIMEOUT;
    loop {
        match UnixStream::connect(socket) {
            Err(error)
                if error.kind() == io::ErrorKind::ConnectionRefused
                    && Instant::now() < deadline =>
            {
                std::thread::sleep(Duration::from_millis(1));
            }
            other => return other.with_context(|| format!("connecting to {}", socket.display())),
        }
    }
}

/// Closes a socket when an exchange on it takes too long: the `vhost` crate's reads cannot be given
/// a time limit of their own.
struct Watchdog {
    arm: Option<mpsc::Sender<Option<Instant>>>,
    thread: Option<JoinHandle<()>>,
}

/// Disarms the watchdog when the exchange is over.
struct Armed(mpsc::Sender<Option<Instant>>);

impl Drop for Armed {
    fn drop(&mut self) {
        let _ = self.0.send(None);
    }
}

impl Watchdog {
    fn new(socket: UnixStream) -> Watchdog {
        let (arm, armed) = mpsc::channel::<Option<Instant>>();
        let thread = std::thread::spawn(move || {
            let mut deadline = None;
            loop {
                deadline = match deadline {
                    None => match armed.recv() {
                        Ok(next) => next,
                        Err(_) => return,
                    },
                    Some(at) => {
                        let left = Instant::saturating_duration_since(&at, Instant::now());
                        match armed.recv_timeout(left) {
                            Ok(next) => next,
                            Err(mpsc::RecvTimeoutError::Disconnected) => return,
                            Err(mpsc::RecvTimeoutError::Timeout) => {
                                super::say("vhost-user back end does not answer: closing");
                                let _ = socket.shutdown(Shutdown::Both);
                                None
                            }
                        }
                    }
                };
            }
        });
        Watchdog { arm: Some(arm), thread: Some(thread) }
    }

    fn arm(&self) -> Armed {
        let arm = self.arm.as_ref().expect("set until dropped").clone();
        let _ = arm.send(Some(Instant::now() + CONTROL_TIMEOUT));
        Armed(arm)
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.arm = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
