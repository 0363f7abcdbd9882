//! Every golden image, served to a guest, reads exactly as its list of content says.

mod support;

use support::daemon::Launch;
use support::frontend::VmConfig;
use support::golden::{self, How, SERVED};

/// Serves one image and reads it in every way, cold and then warm.
fn reads_as_written(launch: &Launch, tree: &golden::Tree, name: &str) {
    let daemon = launch.spawn().expect(name);
    let mut vm = daemon.boot(VmConfig::default()).expect(name);
    let mut fuse = vm.fuse(1);
    fuse.init().expect(name);
    let ways = [
        (How::Lookup, 128 << 10, "cold, by LOOKUP"),
        (How::ReaddirPlus, 1 << 20, "warm, by READDIRPLUS"),
        (How::Lookup, 4096 - 1, "warm, by LOOKUP, odd sizes"),
    ];
    for (how, step, what) in ways {
        let context = format!("{name}, {what}");
        let differences = golden::check(&mut fuse, tree, how, step).expect(&context);
        differences.assert_none(&context);
    }
    fuse.destroy().expect(name);
}

#[test]
fn every_served_image_reads_as_its_tree_says() {
    for (name, bootstrap, tree) in SERVED {
        let scratch = tempfile::tempdir().expect("a scratch directory");
        let case = golden::case_of(name, bootstrap, tree);
        let launch = case.launch(scratch.path());
        reads_as_written(&launch, &case.tree(), &format!("{name}/{bootstrap}"));
    }
}

#[test]
fn a_second_daemon_reads_the_cache_of_the_first() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let case = golden::case("v6-zstd");
    for round in ["first daemon", "second daemon"] {
        reads_as_written(&case.launch(scratch.path()), &case.tree(), round);
    }
}

#[test]
fn images_of_later_kinds_are_refused_by_name() {
    let cases = [
        ("v5-lz4", "v5"),
        ("v5-zstd-sha256", "v5"),
        ("v6-zran", "zran"),
        ("v6-tarref", "tar"),
        ("v6-tarfs-512", "tar"),
        ("v6-encrypted", "encrypt"),
    ];
    for (name, feature) in cases {
        let scratch = tempfile::tempdir().expect("a scratch directory");
        let (status, stderr) = golden::case(name).launch(scratch.path()).run_to_end().expect(name);
        assert_eq!(status.code(), Some(1), "{name}: {stderr}");
        assert!(
            stderr.to_lowercase().contains(feature),
            "{name}: the refusal does not name {feature:?}: {stderr}"
        );
    }
}
