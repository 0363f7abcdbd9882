//! What programs in a real guest see: a tree walk by find, and fio.
//!
//! The guest is User-mode Linux, a kernel as one process that speaks vhost-user itself: nothing is emulated, but it has
//! one CPU and its own price for a system call. It learns the share's name from the device, which nydusd can not say.

use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::report::{Contender, Measures, Series, alternate, by_measure};
use super::subject::{Program, Tree};
use crate::support::guest::{Guest, Machine};

/// Name of the share.
pub const TAG: &str = "image";

/// Each check prints one number for the table. Every one begins with empty caches in the guest.
const JOB: &str = r#"
mkdir -p /dev/shm
mount -t tmpfs none /dev/shm
mount -t virtiofs "$tag" /mnt || echo "no mount"
drop() { sync; echo 3 >/proc/sys/vm/drop_caches; }
now() { cut -d' ' -f1 /proc/uptime; }
walk() {
    drop
    start=$(now)
    entries=$(/bin/find /mnt -xdev -printf '%s\n' | wc -l)
    end=$(now)
    awk "BEGIN { print $entries / ($end - $start) }"
}
# job FIELD FIO-ARGUMENT...: field 8 of the terse format is IOPS, 7 KiB/s
job() {
    field=$1
    shift
    drop
    /mnt/opt/fio/ld-linux-x86-64.so.2 --library-path /mnt/opt/fio /mnt/opt/fio/fio --minimal --terse-version=3 --thread \
        --name=job --readonly --filename="/mnt/$large" --runtime=2 --time_based "$@" >/tmp/fio 2>&1
    grep '^3;' /tmp/fio | cut -d';' -f"$field" | grep . || { cat /tmp/fio; return 1; }
}
check walk walk
check random job 8 --rw=randread --bs=4k --direct=1
check random-32 job 8 --rw=randread --bs=4k --direct=1 --ioengine=libaio --iodepth=32
check buffered job 7 --rw=read --bs=1m
check direct job 7 --rw=read --bs=1m --direct=1 --ioengine=libaio --iodepth=8
"#;

/// Boots a guest for one daemon and takes its numbers.
fn boot(program: Program, tree: &Tree, dir: &Path) -> Result<Option<Measures>> {
    let daemon = program.start(tree, dir)?;
    let largest = tree.files.iter().max_by_key(|file| file.1).context("files")?;
    let before = daemon.cpu_time();
    let report = Guest::new(Machine::Uml72, &daemon.sock, TAG)
        .job(&format!("large='{}'\n{JOB}", largest.0.display()))
        .memory_mib(1024)
        .run()?;
    let cpu = daemon.cpu_time() - before;
    let number = |name: &str| -> Result<f64> {
        let text = report.output(name).trim();
        let check = report.checks.iter().find(|check| check.name == name);
        ensure!(check.is_some_and(|check| check.status == 0), "{name}: {text}");
        text.parse().with_context(|| format!("{name}: {text}"))
    };
    Ok(Some(vec![
        ("find, entries/s", number("walk")?),
        ("4 KiB random, IOPS", number("random")?),
        ("depth 32, IOPS", number("random-32")?),
        ("1 MiB buffered, MiB/s", number("buffered")? / 1024.0),
        ("1 MiB direct, depth 8, MiB/s", number("direct")? / 1024.0),
        ("daemon's CPU s", cpu.as_secs_f64()),
    ]))
}

/// The text of the section, and its rows.
pub fn measure(runs: usize, tree: &Tree, dir: &Path) -> Result<(String, Vec<Series>)> {
    let programs = [Program::Rafsd, Program::Virtiofsd(0), Program::Virtiofsd(8)];
    let contenders =
        programs.map(|program| Contender::new(program.name(), move || boot(program, tree, dir)));
    let all = alternate(contenders.into_iter().collect(), runs)?;
    let text = format!(
        "### in a guest\n\nUser-mode Linux 7.2 with one CPU: `find` reads all attributes of the tree, then fio 3.39 reads its \
         largest file for two seconds each way; the guest's caches are empty before each, the host's are warm. nydusd can not \
         tell the guest the name of the share, so User-mode Linux does not mount it.\n\n{}\n",
        by_measure("daemon", &all)
    );
    Ok((text, all))
}
