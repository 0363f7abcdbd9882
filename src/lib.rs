//! rafsd serves RAFS container images to microVM guests over virtio-fs, lazily.
