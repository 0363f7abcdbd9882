//! Blobs in the partitions of a disk of this host, or of a disk image (config `localdisk`).
//!
//! A blob id has 64 digits, the name of a GPT partition at most 36 characters. So the first 32 digits
//! are the partition's name and the others its GUID. In an older form, known by the partition's type
//! "basic data", the name is all there is. The end of a partition is padding.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::path::PathBuf;

use crate::rafs::id::BlobId;

/// Where the disk is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalDiskConfig {
    pub device_path: PathBuf,
    /// The whole disk is the blob, whatever its id.
    pub disable_gpt: bool,
}

/// Digits of a blob id that are in the name of its partition.
const IN_NAME: usize = 32;

/// The disk and the bytes of it that are `blob`: offset and length. `None` if it has no such blob.
pub fn find(config: &LocalDiskConfig, blob: &BlobId) -> io::Result<Option<(File, u64, u64)>> {
    let mut file = File::open(&config.device_path)?;
    // What metadata says of a block device is 0.
    let size = file.seek(SeekFrom::End(0))?;
    if config.disable_gpt {
        return Ok(Some((file, 0, size)));
    }
    let disk = gpt::GptConfig::new()
        .writable(false)
        .open(&config.device_path)
        .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e.to_string()))?;
    let sector = *disk.logical_block_size();
    let (start_of_id, _) = blob.as_str().split_at(IN_NAME);
    for partition in disk.partitions().values() {
        let guid = partition.part_guid.simple().to_string();
        let found = match partition.part_type_guid == gpt::partition_types::BASIC {
            true => partition.name == start_of_id || partition.name == blob.as_str(),
            false => partition.name.clone() + &guid == blob.as_str(),
        };
        if found {
            let (start, len) = (partition.bytes_start(sector)?, partition.bytes_len(sector)?);
            return match start.checked_add(len) {
                Some(end) if end <= size => Ok(Some((file, start, len))),
                _ => Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("partition {} reaches beyond the disk", partition.name),
                )),
            };
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    const MIB: u64 = 1 << 20;

    #[test]
    fn partitions_are_found_by_name_and_guid() {
        let dir = tempfile::tempdir().unwrap();
        let device_path = dir.path().join("disk");
        let file = File::create(&device_path).unwrap();
        file.set_len(8 * MIB).unwrap();
        let (name, guid) = ("0123456789abcdef".repeat(2), "fedcba9876543210".repeat(2));
        let old = "00112233445566778899aabbccddeeff";
        let mut disk = gpt::GptConfig::new().writable(true).create(&device_path).unwrap();
        let (linux, basic) = (gpt::partition_types::LINUX_FS, gpt::partition_types::BASIC);
        disk.add_partition_at(&name, 1, 2048, 2048, linux, 0).unwrap();
        disk.add_partition_at(old, 2, 4096, 1024, basic, 0).unwrap();
        let mut partitions = disk.take_partitions();
        partitions.get_mut(&1).unwrap().part_guid = guid.parse().unwrap();
        disk.update_partitions(partitions).unwrap();
        disk.write().unwrap();

        let config = LocalDiskConfig { device_path, disable_gpt: false };
        let id = |text: String| BlobId::parse(text.as_bytes()).unwrap();
        let look =
            |blob: &BlobId| find(&config, blob).map(|f| f.map(|(_, start, len)| (start, len)));
        let (new, old) = (id(format!("{name}{guid}")), id(format!("{old}{guid}")));
        assert_eq!(look(&new).unwrap(), Some((2048 * 512, 2048 * 512)));
        assert_eq!(look(&old).unwrap(), Some((4096 * 512, 1024 * 512)));
        assert_eq!(look(&id(format!("{name}{name}"))).unwrap(), None);
        let whole = LocalDiskConfig { disable_gpt: true, ..config.clone() };
        let (_, start, len) = find(&whole, &BlobId::UNKNOWN).unwrap().unwrap();
        assert_eq!((start, len), (0, 8 * MIB));
        file.set_len(2 * MIB).unwrap();
        look(&old).expect_err("beyond the end of the disk");
        file.write_all_at(&[0; 1024], 512).unwrap();
        look(&new).expect_err("no partition table");
    }
}
