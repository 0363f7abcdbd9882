//! DAX: what a guest with a window of file data saves, in time, requests and memory.
//!
//! Guests are Linux 7.3 under QEMU 11.1, whose generic vhost-user device has the window; without one they have
//! `vhost-user-fs-pci`, its usual device. Where there is no KVM the processors are emulated, which makes everything in
//! the guest slow, reads by request most of all. The policy `shared` needs a VMM that maps read-only: our own.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, ensure};

use super::guest::TAG;
use super::report::{Contender, Measures, Series, alternate, by_measure, by_rows, show};
use crate::support::daemon::{Daemon, Launch};
use crate::support::frontend::VmConfig;
use crate::support::fuse_abi::init;
use crate::support::guest::{Guest, Machine};
use crate::support::image::create;
use crate::support::parts::{Parts, run};
use crate::support::rng::Rng;
use crate::support::window::Takes;
use crate::support::{say, to_usize};

/// Bytes of the file that is scanned.
const LARGE: u64 = 200 << 20;
/// Bytes of each set of equal files.
const SET: u64 = 8 << 20;
/// Sizes of the files of those sets, in KiB.
const SIZES: [u64; 5] = [64, 128, 256, 512, 1024];
/// How many guests read at a time.
const GUESTS: [usize; 3] = [1, 2, 4];
const WINDOW: u64 = 512 << 20;
const RANGE: u64 = 2 << 20;

/// The row that a goal looks at.
pub const PRIVATE: &str = "rafsd, --dax private";
pub const REQUESTS: &str = "requests of both second scans";
pub const GREW: &str = "guest's page cache, MiB more";

const HEAD: &str = r#"
drop() { sync; echo 3 >/proc/sys/vm/drop_caches; }
please() { echo "host-please $1" >/dev/console; sleep 1; }
meminfo() { awk -v name="$1:" '$1 == name { print $2 / 1024 }' /proc/meminfo; }
check mount mount -t virtiofs "$tag" /mnt
"#;

/// fio's runtime in ms is the ninth field of its terse format. Its own pages are there before anything is measured.
const SCANS: &str = r#"
fio() {
    /mnt/fio/ld-linux-x86-64.so.2 --library-path /mnt/fio /mnt/fio/fio --minimal --terse-version=3 --thread --name=job \
        --readonly --invalidate=0 --rw=read "$@" >/tmp/fio 2>&1
    grep '^3;' /tmp/fio | cut -d';' -f9 | grep . || { cat /tmp/fio; return 1; }
}
mkdir -p /dev/shm
mount -t tmpfs none /dev/shm
scan() { fio --filename=/mnt/large --bs=1m --ioengine="$1"; }
for engine in psync mmap; do
    drop
    fio --filename=/mnt/fio/fio --bs=64k --ioengine=$engine >/dev/null
    cached=$(meminfo Cached)
    check $engine-first scan $engine
    please count
    check $engine-second scan $engine
    please count
    check $engine-cached awk "BEGIN { print $(meminfo Cached) - $cached }"
done
"#;

const MEMORY: &str = r#"
free=$(meminfo MemFree)
please measure
check read sh -c 'cat /mnt/large >/dev/null'
please measure
check taken awk "BEGIN { print $free - $(meminfo MemFree) }"
"#;

/// A pass reads all files of a set; the first finds no data in the guest.
const SETS: &str = r#"
umount /mnt
mount -t virtiofs -o dax=$dax "$tag" /mnt
now() { cut -d' ' -f1 /proc/uptime; }
# passes N: ms for each file of the set, N times over
passes() {
    count=$(ls /mnt/$set | wc -l)
    start=$(now)
    for pass in $(seq "$1"); do tail -q -c +1 /mnt/$set/* >/dev/null; done
    awk "BEGIN { print ($(now) - $start) * 1000 / $count / $1 }"
}
for set in $sets; do
    drop
    ls /mnt/$set >/dev/null
    check $set-first passes 1
    check $set-again passes 3
done
"#;

/// The files, plain and as an image of chunks of 1 MiB, of which nothing is compressed.
struct Files {
    root: PathBuf,
    bootstrap: PathBuf,
    blobs: PathBuf,
}

impl Files {
    fn write(dir: &Path) -> Result<Files> {
        let (root, blobs, bootstrap) = (dir.join("files"), dir.join("blobs"), dir.join("boot"));
        fs::create_dir_all(&root)?;
        fs::create_dir_all(&blobs)?;
        let fio = Parts::install(&["fio"])?.path("fio")?;
        run(Command::new("cp").arg("-a").arg(fio).arg(root.join("fio")))?;
        let mut rng = Rng::new(3);
        let mut write = |path: &Path, len: u64| -> Result<()> {
            let mut file = std::io::BufWriter::new(File::create(path)?);
            for _ in 0..len / 8 {
                file.write_all(&rng.next().to_le_bytes())?;
            }
            Ok(file.flush()?)
        };
        write(&root.join("large"), LARGE)?;
        for kib in SIZES {
            let set = root.join(format!("set-{kib}"));
            fs::create_dir(&set)?;
            for number in 0..SET / (kib << 10) {
                write(&set.join(format!("{number:03}")), kib << 10)?;
            }
        }
        let arguments: [&Path; 7] = [
            "--bootstrap".as_ref(),
            &bootstrap,
            "--blob-dir".as_ref(),
            &blobs,
            "--compressor".as_ref(),
            "none".as_ref(),
            &root,
        ];
        create(&arguments.map(Path::as_os_str))?;
        Ok(Files { root, bootstrap, blobs })
    }
}

/// Who serves a guest, and how it reads.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Window,
    Requests,
    Virtiofsd,
}

impl Way {
    const ALL: [Way; 3] = [Way::Window, Way::Requests, Way::Virtiofsd];

    fn name(self) -> &'static str {
        match self {
            Way::Window => PRIVATE,
            Way::Requests => "rafsd",
            Way::Virtiofsd => "virtiofsd",
        }
    }

    /// A daemon for guest `number`. All of rafsd have one cache.
    fn start(self, files: &Files, dir: &Path, number: usize) -> Result<Daemon> {
        let dir = dir.join(format!("{}-{number}", self as u8));
        fs::create_dir_all(&dir)?;
        if self == Way::Virtiofsd {
            let sock = dir.join("sock");
            let mut command = Command::new(Parts::install(&["virtiofsd"])?.path("virtiofsd")?);
            command.arg("--socket-path").arg(&sock).arg("--shared-dir").arg(&files.root);
            command.args(["--cache", "always", "--sandbox", "none", "--log-level", "error"]);
            command.stdin(Stdio::null()).stdout(Stdio::null());
            return Daemon::spawn(command, &sock);
        }
        let mut launch = launch(files, &dir).arg("--apisock").arg(dir.join("api"));
        if self == Way::Window {
            launch = window(launch, "private");
        }
        launch.spawn()
    }

    fn guest(self, daemon: &Daemon, job: String) -> Guest {
        let guest = Guest::new(Machine::Qemu11Linux73, &daemon.sock, TAG).job(&job).beside_others();
        if self == Way::Window { guest.with_window() } else { guest }
    }
}

/// The cache is one for all of them.
fn launch(files: &Files, dir: &Path) -> Launch {
    let mut launch = Launch::new(&files.bootstrap, &files.blobs, dir)
        .work_dir(&files.blobs.with_file_name("cache"))
        .arg("--tag")
        .arg(TAG);
    launch.log_level = "warn".into();
    launch
}

fn window(launch: Launch, policy: &str) -> Launch {
    let size = format!("{}M", WINDOW >> 20);
    launch.arg("--dax").arg(policy).arg("--dax-window").arg(size)
}

/// What rafsd has been asked for file data so far.
fn requests(api: &Path) -> Result<f64> {
    let mut stream = UnixStream::connect(api)?;
    write!(stream, "GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let count = |opcode: &str| {
        let name = format!("rafsd_fuse_requests_total{{opcode=\"{opcode}\"}} ");
        let line = text.lines().find_map(|line| line.strip_prefix(&name));
        line.map_or(Ok(0.0), str::parse::<f64>)
    };
    Ok(count("read")? + count("setupmapping")?)
}

/// Calls `act` at each line of the console that asks for `what`; what it returned comes back.
fn at_each<T: Send + 'static>(
    guest: Guest,
    what: &'static str,
    act: impl Fn() -> Result<T> + Send + Sync + 'static,
) -> (Guest, Arc<Mutex<Vec<Result<T>>>>) {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let into = Arc::clone(&seen);
    let guest = guest.watch(move |line| {
        if line.contains(what) {
            into.lock().unwrap_or_else(PoisonError::into_inner).push(act());
        }
    });
    (guest, seen)
}

fn taken<T>(seen: &Mutex<Vec<Result<T>>>) -> Result<Vec<T>> {
    std::mem::take(&mut *seen.lock().unwrap_or_else(PoisonError::into_inner)).into_iter().collect()
}

/// The number that a check of the guest's has printed.
fn number(report: &crate::support::guest::Report, name: &str) -> Result<f64> {
    let check = report.checks.iter().find(|check| check.name == name);
    let check = check.with_context(|| format!("no check '{name}'"))?;
    let text = check.output.trim();
    ensure!(check.status == 0, "{name}: {text}");
    text.parse().with_context(|| format!("{name}: {text}"))
}

/// A large file twice, by read and by mmap.
fn scans(way: Way, files: &Files, dir: &Path) -> Result<Option<Measures>> {
    let daemon = way.start(files, dir, 0)?;
    let api = daemon.sock.with_file_name("api");
    let guest = way.guest(&daemon, format!("{HEAD}{SCANS}"));
    let count = move || if way == Way::Virtiofsd { Ok(f64::NAN) } else { requests(&api) };
    let (guest, seen) = at_each(guest, "host-please count", count);
    let report = guest.run()?;
    let rate = |name: &str| Ok::<_, anyhow::Error>(200.0 * 1000.0 / number(&report, name)?);
    let counts = taken(&seen)?;
    ensure!(counts.len() == 4, "{} counts", counts.len());
    let mut measures = vec![
        ("read, first", rate("psync-first")?),
        ("read, second", rate("psync-second")?),
        ("mmap, first", rate("mmap-first")?),
        ("mmap, second", rate("mmap-second")?),
        (GREW, number(&report, "psync-cached")?.max(number(&report, "mmap-cached")?)),
    ];
    if way != Way::Virtiofsd {
        measures.push((REQUESTS, counts[1] - counts[0] + counts[3] - counts[2]));
    }
    Ok(Some(measures))
}

/// MiB of a field of /proc/PID/smaps_rollup.
fn resident(pid: u32, field: &str) -> Result<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    let kib = line.context("no such field")?.trim().trim_end_matches(" kB");
    Ok(kib.parse::<f64>()? / 1024.0)
}

/// So many guests at a time read the large file: what the processes have more then, and what each guest has less.
fn memory(way: Way, guests: usize, files: &Files, dir: &Path) -> Result<(f64, f64)> {
    let each = |number_of_guest: usize| -> Result<(f64, f64)> {
        let daemon = way.start(files, dir, number_of_guest)?;
        let pids = daemon.sock.with_file_name("qemu-pid");
        let guest = way.guest(&daemon, format!("{HEAD}{MEMORY}"));
        let guest = guest.memory_mib(512).qemu_arg("-pidfile").qemu_arg(&pids.to_string_lossy());
        let pid = daemon.pid();
        let (guest, seen) = at_each(guest, "host-please measure", move || {
            let qemu = fs::read_to_string(&pids)?.trim().parse()?;
            Ok(resident(pid, "Pss")? + resident(qemu, "Pss")?)
        });
        let report = guest.run()?;
        let seen = taken(&seen)?;
        ensure!(seen.len() == 2, "measured {} times", seen.len());
        Ok((seen[1] - seen[0], number(&report, "taken")?))
    };
    let all: Vec<Result<(f64, f64)>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..guests).map(|guest| scope.spawn(move || each(guest))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    });
    let all = all.into_iter().collect::<Result<Vec<_>>>()?;
    let less = all.iter().map(|guest| guest.1).sum::<f64>() / guests as f64;
    Ok((all.iter().map(|guest| guest.0).sum(), less))
}

/// The same with `shared`, in a VMM that maps read-only, which is this process: what the windows of so many guests
/// have.
fn shared_memory(numbers: &[usize], files: &Files, dir: &Path) -> Result<Vec<f64>> {
    let mut kept = Vec::new();
    let mut sums = Vec::new();
    for &guests in numbers {
        while kept.len() < guests {
            let dir = dir.join(format!("shared-{}", kept.len()));
            fs::create_dir_all(&dir)?;
            let daemon = window(launch(files, &dir), "shared").spawn()?;
            let config = VmConfig { window: Some(Takes::ReadOnly), ..VmConfig::default() };
            let mut vm = daemon.boot(config)?;
            let mut fuse = vm.fuse(1);
            fuse.init_with(init::LINUX_7 | init::MAP_ALIGNMENT | init::HAS_INODE_DAX)?;
            let node = fuse.resolve(b"large")?;
            let window = Arc::clone(vm.window().context("no window")?);
            for range in 0..LARGE / RANGE {
                fuse.map(node, range * RANGE, range * RANGE)?;
                window.read(range * RANGE, to_usize(RANGE));
            }
            kept.push((daemon, vm, window));
        }
        let places: Vec<usize> = kept.iter().map(|(.., window)| window.addr()).collect();
        sums.push(resident_at(&places)?);
    }
    Ok(sums)
}

/// MiB of this process in windows at these addresses; what is mapped several times counts once.
fn resident_at(places: &[usize]) -> Result<f64> {
    let (mut inside, mut sum) = (false, 0.0);
    for line in BufReader::new(File::open("/proc/self/smaps")?).lines() {
        let line = line?;
        if let Some((start, _)) = line.split(' ').next().unwrap_or_default().split_once('-')
            && let Ok(start) = usize::from_str_radix(start, 16)
        {
            inside = places.iter().any(|&at| (at..at + to_usize(WINDOW)).contains(&start));
        } else if inside && let Some(kib) = line.strip_prefix("Pss:") {
            sum += kib.trim().trim_end_matches(" kB").parse::<f64>()? / 1024.0;
        }
    }
    Ok(sum)
}

/// Files of several sizes, all through the window or none.
fn sets(files: &Files, dir: &Path) -> Result<String> {
    let measure = |mode: &str| -> Result<Vec<f64>> {
        let daemon = Way::Window.start(files, dir, 9)?;
        let names: Vec<String> = SIZES.iter().map(|kib| format!("set-{kib}")).collect();
        let job = format!("{HEAD}dax={mode}\nsets='{}'\n{SETS}", names.join(" "));
        let report = Way::Window.guest(&daemon, job).run()?;
        let each = |name: &String| {
            Ok([
                number(&report, &format!("{name}-first"))?,
                number(&report, &format!("{name}-again"))?,
            ])
        };
        let all = names.iter().map(each).collect::<Result<Vec<_>>>()?;
        Ok(all.concat())
    };
    let (window, requests) = (measure("always")?, measure("never")?);
    let rows = SIZES.iter().zip(window.chunks(2).zip(requests.chunks(2))).map(|(kib, (w, r))| {
        let mut row = vec![format!("{kib} KiB")];
        row.extend([w[0], r[0], w[1], r[1]].map(show));
        row
    });
    let header =
        ["files of", "window, first", "requests, first", "window, again", "page cache, again"];
    Ok(by_rows(header.map(str::to_owned).to_vec(), rows.collect()))
}

/// The text of the section, and the rows of the scans.
pub fn measure(runs: usize, scratch: &Path) -> Result<(String, Vec<Series>)> {
    let dir = scratch.join("dax");
    let files = Files::write(&dir)?;
    let contenders = Way::ALL.map(|way| {
        let (files, dir) = (&files, &dir);
        Contender::new(way.name(), move || scans(way, files, dir))
    });
    let all = alternate(contenders.into_iter().collect(), runs)?;
    say("dax: scans are done");
    let mut rows = Vec::new();
    for way in [Way::Window, Way::Requests] {
        let mut row = vec![way.name().to_owned()];
        let mut less = 0.0;
        for guests in GUESTS {
            let (host, guest) = memory(way, guests, &files, &dir)?;
            row.push(show(host));
            less = guest;
        }
        row.push(show(less));
        rows.push(row);
    }
    say("dax: memory of guests is measured");
    let mut shared = vec!["rafsd, --dax shared".to_owned()];
    shared.extend(shared_memory(&GUESTS, &files, &dir)?.into_iter().map(show));
    shared.push("—".into());
    rows.push(shared);
    let header = ["MiB more of", "1 guest", "2 guests", "4 guests", "in each guest"];
    let parts = Parts::install(&["guests"])?;
    let accel = parts.value("accel")?;
    let text = format!(
        "### DAX\n\nLinux 7.3 with two processors ({accel}) on QEMU 11.1 reads a file of 200 MiB twice with fio, 1 MiB at a \
         time: by read and by mapping it, each beginning with empty caches in the guest and warm ones on the host. With a window \
         (`--dax private`, 512 MiB) the device is QEMU's generic one, otherwise `vhost-user-fs-pci`. \
         Requests are READ and SETUPMAPPING. MiB/s:\n\n{}\n\n\
         Memory: what the processes of the host (QEMU and the daemon, Pss) and the guest (MemFree) give for the same file, \
         when 1, 2 and 4 guests have read it; beside it, the file is once in the host's page cache. `shared` needs a VMM that maps \
         read-only, which is our own; there it is the pages of the page cache, as the VMM has them mapped.\n\n{}\n\n\
         Milliseconds for each file, where files of one size are read whole, {} MiB of them, through the window (`dax=always`) or \
         by requests (`dax=never`), for the first time and again:\n\n{}\n",
        by_measure("daemon", &all),
        by_rows(header.map(str::to_owned).to_vec(), rows),
        SET >> 20,
        sets(&files, &dir)?,
    );
    Ok((text, all))
}
