//! Entries of a directory, as READDIR and READDIRPLUS want them.

use zerocopy::IntoBytes;

use super::abi::{self, Dirent, Direntplus, EntryOut};
use super::file_system::Entry;
use super::mounts::Place;
use super::reply::Payload;

/// Bytes of the largest record.
const RECORD_MAX: usize = size_of::<Direntplus>() + abi::NAME_MAX + 1;

/// Takes entries of a file system until the guest's buffer is full.
pub(super) struct Listing<'a> {
    records: Records<'a>,
    place: Place<'a>,
}

/// Takes records until the guest's buffer is full.
pub(super) struct Records<'a> {
    payload: Payload<'a>,
    plus: bool,
    empty: bool,
    full: bool,
}

/// A name to list.
pub(super) struct Name<'a> {
    pub(super) name: &'a [u8],
    pub(super) ino: u64,
    /// `DT_*`.
    pub(super) kind: u32,
    /// Where a listing goes on behind this name.
    pub(super) next_cookie: u64,
}

impl<'a> Listing<'a> {
    /// A listing of a directory in the file system of `place`.
    pub(super) fn new(payload: Payload<'a>, place: Place<'a>, plus: bool) -> Self {
        Listing { records: Records::new(payload, plus), place }
    }

    /// Whether entries should come with their attributes.
    pub(super) fn wants_attributes(&self) -> bool {
        self.records.plus
    }

    /// Whether nothing has been written.
    pub(super) fn is_empty(&self) -> bool {
        self.records.empty
    }

    /// Writes one entry, or returns false: it does not fit, and belongs into the next listing.
    ///
    /// A listing with attributes remembers `entry` in the guest as if it had been looked up. `.`,
    /// `..` and what cannot be read have none: the guest looks those up itself.
    #[must_use]
    pub(super) fn put(&mut self, name: &Name<'_>, entry: Option<&Entry>) -> bool {
        let entry = match entry {
            Some(_) if self.records.plus => Some(self.place.entry_out(entry)),
            _ => None,
        };
        let name = Name { ino: self.place.ino(name.ino), ..*name };
        self.records.put(&name, entry.as_ref())
    }

    /// As [`Records::into_payload`].
    pub(super) fn into_payload(self) -> Option<Payload<'a>> {
        self.records.into_payload()
    }
}

impl<'a> Records<'a> {
    /// A listing, with attributes or without.
    pub(super) fn new(payload: Payload<'a>, plus: bool) -> Self {
        Records { payload, plus, empty: true, full: false }
    }

    /// As [`Listing::put`], with what the guest is told as it is told.
    #[must_use]
    pub(super) fn put(&mut self, name: &Name<'_>, entry: Option<&EntryOut>) -> bool {
        let Ok(namelen) = u32::try_from(name.name.len()) else { return false };
        let dirent = Dirent { ino: name.ino, off: name.next_cookie, namelen, kind: name.kind };
        let mut record = [0; RECORD_MAX];
        let head = if self.plus {
            let entry = entry.copied().unwrap_or_default();
            copy(&mut record, Direntplus { entry, dirent }.as_bytes())
        } else {
            copy(&mut record, dirent.as_bytes())
        };
        let len = (head + name.name.len()).next_multiple_of(8);
        if len > RECORD_MAX {
            return false;
        }
        record[head..head + name.name.len()].copy_from_slice(name.name);
        let fits = self.payload.put(&record[..len]);
        self.empty &= !fits;
        self.full |= !fits;
        fits
    }

    /// What was written; `None` if not even the first entry found room, which an empty listing
    /// would pass off as the end of the directory.
    pub(super) fn into_payload(self) -> Option<Payload<'a>> {
        (!(self.empty && self.full)).then_some(self.payload)
    }
}

/// Puts `bytes` at the start of `record`, and returns their number.
fn copy(record: &mut [u8; RECORD_MAX], bytes: &[u8]) -> usize {
    record[..bytes.len()].copy_from_slice(bytes);
    bytes.len()
}
