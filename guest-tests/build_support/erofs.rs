//! The kernel as a reader of our images: EROFS mounts, with the uncompressed blobs as devices.

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rafsd::rafs::Bootstrap;

use super::rafs_reader;

/// The uncompressed blobs of an image, made in `out` by `rafs_reader.py`, in the order of its blob table: the
/// kernel and erofs-utils number devices so.
pub fn devices(bootstrap: &Path, blobs: &Path, out: &Path) -> Vec<PathBuf> {
    rafs_reader(&[
        "device".as_ref(),
        bootstrap.as_ref(),
        "--blobs".as_ref(),
        blobs.as_ref(),
        "--out".as_ref(),
        out.as_ref(),
    ]);
    let image = Bootstrap::open(bootstrap).unwrap();
    image.blobs().iter().map(|blob| out.join(blob.id.as_str())).collect()
}

/// An EROFS mount, unmounted when it is dropped. Needs root and a kernel with EROFS on files.
pub struct Mount {
    pub at: PathBuf,
}

impl Mount {
    pub fn new(image: &Path, devices: &[PathBuf], at: PathBuf) -> Mount {
        std::fs::create_dir_all(&at).unwrap();
        let c = |bytes: &[u8]| CString::new(bytes).unwrap();
        let options: Vec<_> =
            devices.iter().map(|device| format!("device={}", device.display())).collect();
        let (source, target) = (c(image.as_os_str().as_bytes()), c(at.as_os_str().as_bytes()));
        let options = c(options.join(",").as_bytes());
        // SAFETY: all pointers are to strings that end with NUL and outlive the call.
        let done = unsafe {
            libc::mount(
                source.as_ptr(),
                target.as_ptr(),
                c"erofs".as_ptr(),
                libc::MS_RDONLY,
                options.as_ptr().cast(),
            )
        };
        assert_eq!(done, 0, "mounting {}: {}", image.display(), io::Error::last_os_error());
        Mount { at }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let target = CString::new(self.at.as_os_str().as_bytes()).unwrap();
        // SAFETY: the pointer is to a string that ends with NUL and outlives the call.
        let done = unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
        assert_eq!(done, 0, "unmounting: {}", io::Error::last_os_error());
    }
}
