//! What many blobs in an image, and many images in a daemon, cost.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::Settings;
use super::load::{Anywhere, Opened, Reads, drive};
use super::report::{Contender, Measures, Series, alternate, by_measure};
use super::subject::{Program, Tree};
use crate::support::daemon::{Daemon, START_TIMEOUT};
use crate::support::fuse_abi::ROOT_ID;
use crate::support::parts::run;
use crate::support::rng::Rng;

/// Bytes of all blobs of an image together.
const BYTES: usize = 64 << 20;
const BLOBS: [usize; 4] = [1, 10, 50, 250];
/// Images that are mounted into one daemon.
const IMAGES: u64 = 16;

/// An image of so many layers with a blob each: its bootstrap and the directory of the blobs.
fn layered(dir: &Path, count: usize) -> Result<(PathBuf, PathBuf)> {
    let (blobs, bootstrap) = (dir.join("blobs"), dir.join("bootstrap"));
    fs::create_dir_all(&blobs)?;
    let rafs = || Command::new(env!("CARGO_BIN_EXE_rafs"));
    let mut merge = rafs();
    merge.arg("merge").arg("-B").arg(&bootstrap);
    for layer in 0..count {
        let bytes = Rng::new(layer as u64).bytes(BYTES / count);
        let (tree, out) = (dir.join("layer"), dir.join("packed"));
        fs::create_dir_all(&tree)?;
        fs::create_dir_all(&out)?;
        fs::write(tree.join(format!("f{layer}")), bytes)?;
        let mut tar = tar::Builder::new(fs::File::create(dir.join("layer.tar"))?);
        tar.append_dir_all(".", &tree)?;
        tar.finish()?;
        run(rafs()
            .args(["create", "-t", "tar-rafs", "-i", "-F", "blob-toc", "--whiteout-spec", "none"])
            .arg("-D")
            .arg(&out)
            .arg(dir.join("layer.tar")))?;
        let made = fs::read_dir(&out)?.next().context("a packed blob")??;
        let blob = blobs.join(made.file_name());
        fs::rename(made.path(), &blob)?;
        merge.arg(blob);
        fs::remove_dir_all(&tree)?;
    }
    run(&mut merge)?;
    Ok((bootstrap, blobs))
}

fn read_blobs(
    program: Program,
    (bootstrap, blobs): &(PathBuf, PathBuf),
    dir: &Path,
    count: usize,
    settings: &Settings,
) -> Result<Option<Measures>> {
    let launch = program.launch(bootstrap, blobs, dir)?;
    let _ = fs::remove_dir_all(&launch.work_dir);
    let start = Instant::now();
    let daemon = launch.spawn()?;
    let (_vm, mut queues) = program.guest(&daemon)?;
    let fuse = &mut queues[0];
    fuse.lookup(ROOT_ID, b"f0")?;
    let mount = start.elapsed();
    let size = (BYTES / count) as u64;
    let mut files = Vec::new();
    for layer in 0..count {
        let node = fuse.lookup(ROOT_ID, format!("f{layer}").as_bytes())?.nodeid;
        let fh = fuse.open(node)?;
        fuse.read_all(node, 128 << 10)?;
        files.push(Opened { node, fh, size });
    }
    let sizes = files.iter().map(|file| file.size);
    let places = Anywhere::new(sizes, 4096, 1, Instant::now() + settings.time);
    let cpu = daemon.cpu_time();
    let outcome = drive(fuse, 32, &mut Reads::new(&files, places, 4096))?;
    let cpu = daemon.cpu_time() - cpu;
    let usage = daemon.usage();
    Ok(Some(vec![
        ("mount ms", mount.as_secs_f64() * 1e3),
        ("requests/s", outcome.units as f64 / outcome.time.as_secs_f64()),
        ("CPU µs/request", cpu.as_secs_f64() * 1e6 / outcome.units as f64),
        ("RSS MiB", usage.rss_kib as f64 / 1024.0),
        ("of it anonymous", usage.anon_kib as f64 / 1024.0),
        ("descriptors", usage.fds as f64),
    ]))
}

/// The text of the section, and its rows.
pub fn blobs(settings: &Settings, runs: usize, scratch: &Path) -> Result<(String, Vec<Series>)> {
    let mut images = Vec::new();
    for count in BLOBS {
        let dir = scratch.join(format!("blobs-{count}"));
        images.push((layered(&dir, count)?, dir, count));
    }
    let contenders = images.iter().flat_map(|(image, dir, count)| {
        [Program::Rafsd, Program::Nydusd].map(|program| {
            let plural = if *count == 1 { "" } else { "s" };
            let name = format!("{}, {count} blob{plural}", program.name());
            Contender::new(name, move || read_blobs(program, image, dir, *count, settings))
        })
    });
    let all = alternate(contenders.collect(), runs)?;
    let text = format!(
        "### number of blobs\n\n{} MiB in one file for each blob, merged from as many layers; READs of 4 KiB anywhere at depth \
         32, all of it cached.\n\n{}\n",
        BYTES >> 20,
        by_measure("daemon", &all)
    );
    Ok((text, all))
}

/// One request to a daemon's API, which must succeed.
fn call(api: &Path, method: &str, path: &str, body: &str) -> Result<()> {
    let mut stream = UnixStream::connect(api)?;
    let len = body.len();
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len}\r\n\r\n{body}"
    )?;
    // nydusd keeps the connection open.
    let (mut answer, mut buffer) = (Vec::new(), [0; 4096]);
    while !answer.windows(4).any(|four| four == b"\r\n\r\n") {
        let n = stream.read(&mut buffer)?;
        ensure!(n > 0, "the API closed the connection");
        answer.extend_from_slice(&buffer[..n]);
    }
    let answer = String::from_utf8_lossy(&answer);
    ensure!(answer.split(' ').nth(1).is_some_and(|s| s.starts_with('2')), "{path}: {answer}");
    Ok(())
}

/// Starts an empty daemon and mounts the image again and again.
fn mount_many(program: Program, tree: &Tree, dir: &Path) -> Result<Option<Measures>> {
    let launch = program.launch(&tree.bootstrap, &tree.blobs, dir)?;
    let _ = fs::remove_dir_all(&launch.work_dir);
    fs::create_dir_all(&launch.work_dir)?;
    let api = launch.sock.with_extension("api");
    let _ = fs::remove_file(&api);
    let _ = fs::remove_file(&launch.sock);
    let mut command = Command::new(&launch.program);
    command.args(["virtiofs", "--log-level", "warn", "--sock"]).arg(&launch.sock);
    command.arg("--apisock").arg(&api).args(&launch.extra);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let daemon = Daemon::spawn(command, &launch.sock)?;
    let deadline = Instant::now() + START_TIMEOUT;
    while !api.exists() {
        ensure!(Instant::now() < deadline, "no API");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    let config = json!({
        "device": {
            "backend": {"type": "localfs", "config": {"dir": tree.blobs}},
            "cache": {"type": "blobcache", "config": {"work_dir": launch.work_dir}},
        },
        "mode": "direct",
        "enable_xattr": true,
    });
    let body = json!({"fs_type": "rafs", "source": tree.bootstrap, "config": config.to_string()});
    let empty = daemon.usage();
    let start = Instant::now();
    for image in 0..IMAGES {
        call(&api, "POST", &format!("/api/v1/mount?mountpoint=/i{image}"), &body.to_string())?;
    }
    let each = start.elapsed().as_secs_f64() * 1e3 / IMAGES as f64;
    let full = daemon.usage();
    let per_image = |full: u64, empty: u64| full.saturating_sub(empty) as f64 / IMAGES as f64;
    Ok(Some(vec![
        ("empty: RSS MiB", empty.rss_kib as f64 / 1024.0),
        ("of it anonymous", empty.anon_kib as f64 / 1024.0),
        ("image: ms to mount", each),
        ("RSS KiB", per_image(full.rss_kib, empty.rss_kib)),
        ("of it anonymous KiB", per_image(full.anon_kib, empty.anon_kib)),
        ("descriptors", per_image(full.fds as u64, empty.fds as u64)),
        ("threads", per_image(full.threads as u64, empty.threads as u64)),
    ]))
}

/// The text of the section, and its rows.
pub fn images(runs: usize, tree: &Tree, scratch: &Path) -> Result<(String, Vec<Series>)> {
    let dir = scratch.join("images");
    fs::create_dir(&dir)?;
    let contenders = [Program::Rafsd, Program::Nydusd].map(|program| {
        let dir = &dir;
        Contender::new(program.name(), move || mount_many(program, tree, dir))
    });
    let all = alternate(contenders.into_iter().collect(), runs)?;
    let text = format!(
        "### number of images\n\nA daemon without an image, and what each of {IMAGES} mounts of the Debian image by its API \
         adds; nothing was read.\n\n{}\n",
        by_measure("daemon", &all)
    );
    Ok((text, all))
}
