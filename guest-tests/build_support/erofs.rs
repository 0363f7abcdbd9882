//! Images under the kernel's own EROFS.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::{Built, rafs_reader};

/// The uncompressed blobs in the order of the blob table, as the kernel wants them.
pub fn devices(built: &Built, out: &Path) -> Vec<PathBuf> {
    let dir = out.join("devices");
    rafs_reader(&[
        "device".as_ref(),
        built.bootstrap.as_ref(),
        "--blobs".as_ref(),
        built.blobs.as_ref(),
        "--out".as_ref(),
        dir.as_ref(),
    ]);
    built.open().blobs().iter().map(|blob| dir.join(blob.id.as_str())).collect()
}

/// An EROFS mount, unmounted when it is dropped.
pub struct Mount {
    pub at: PathBuf,
}

impl Mount {
    pub fn new(image: &Path, devices: &[PathBuf], at: PathBuf) -> Mount {
        fs::create_dir_all(&at).unwrap();
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
