use rafsd::fuse::*;
fn main() {
    env_logger::init();
    let a: Vec<String> = std::env::args().collect();
    let rt =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let mounts = Mounts::new();
    let open = a.get(3).map_or(8192, |n| n.parse().unwrap());
    let fs = PassthroughFs::new(
        a[1].as_ref(),
        PassthroughOptions { open_inodes: open, ..Default::default() },
    )
    .unwrap();
    mounts.mount(&MountPath::root(), fs.into()).unwrap();
    let (_m, dev) = HostMount::new(a[2].as_ref(), true).unwrap();
    let s =
        HostSession::new(Server::new(mounts, ServerOptions::default()), dev, rt.handle().clone())
            .unwrap();
    let r = s.serve(4);
    eprintln!("{r:?}");
}
