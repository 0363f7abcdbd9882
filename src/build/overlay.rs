//! Layers on top of each other, as the OCI image specification has it.
//!
//! In every directory the removals of a layer come first, against what lower layers have, whatever
//! their order in the layer; then its other entries. A directory over a directory keeps what is in
//! the lower one; everything else takes the place of what was there. A directory that a layer needs
//! but does not list changes nothing of a lower one; over a symbolic link it means the directory that
//! the link leads to, as it does for programs that unpack layers; if there is nothing and it holds only
//! marks, nothing comes of it.
//!
//! A hard link to a path that its layer did not hold at that point names the file that the lower
//! layers have there, removals of this layer not considered; if there is none, the file of this layer
//! that came later.

use std::collections::{HashMap, HashSet};
use std::rc::Rc;

use super::draft::{Body, Draft, Inode, InodeId};
use super::error::BuildError;
use super::tar::shown;
use super::whiteout::{Mark, WhiteoutSpec};

/// Hard links to hard links that came too early, at most.
const CHAIN_MAX: usize = 40;

/// Puts `upper` on top of `lower`; the chunks of both must count the same blobs. The lowest layer
/// goes on top of [`Draft::new`]: so its marks are dropped.
///
/// # Errors
///
/// If a hard link leads nowhere or to a directory, or a limit of the format is reached.
pub fn apply(lower: &mut Draft, upper: Draft, spec: WhiteoutSpec) -> Result<(), BuildError> {
    let in_lower = resolve(lower, &upper)?;
    let shift = lower.append(upper)?;
    let shifted = |id: InodeId| InodeId(id.0 + shift);
    let mut links = HashMap::new();
    for (link, target) in in_lower {
        let target = match target {
            Target::Lower(id) => id,
            Target::Upper(id) => shifted(id),
        };
        // RAFS gives everything but files one name each.
        let target = match &lower.inode(target).body {
            Body::File { .. } => target,
            _ => lower.add(lower.inode(target).clone())?,
        };
        links.insert(shifted(link), target);
    }
    let root = shifted(InodeId::ROOT);
    let nothing = only_marks(lower, root, spec);
    Merge { draft: lower, spec, links, nothing }.run(root)
}

/// Directories that a layer has no entry for, and nothing below them but marks: they make nothing.
fn only_marks(draft: &Draft, root: InodeId, spec: WhiteoutSpec) -> HashSet<InodeId> {
    let mut dirs = vec![root];
    let mut next = 0;
    while let Some(&dir) = dirs.get(next) {
        next += 1;
        let children = draft.dir(dir).children.values().copied();
        dirs.extend(children.filter(|&id| draft.is_dir(id)));
    }
    let mut nothing = HashSet::new();
    // Those below come behind those above.
    for &id in dirs.iter().rev() {
        let dir = draft.dir(id);
        let is_nothing = dir.implied
            && !dir.opaque
            && dir.children.iter().all(|(name, child)| {
                nothing.contains(child) || spec.mark(name, draft.inode(*child)).is_some()
            });
        if is_nothing {
            nothing.insert(id);
        }
    }
    nothing
}

/// Where a hard link that came too early leads.
enum Target {
    Lower(InodeId),
    Upper(InodeId),
}

/// Finds the targets of all hard links of `upper` that are open.
fn resolve(lower: &Draft, upper: &Draft) -> Result<Vec<(InodeId, Target)>, BuildError> {
    let mut found = Vec::new();
    for (id, target) in upper.open_links() {
        let fail = |reason: &str| {
            Err(BuildError::Layer {
                offset: None,
                reason: format!("a hard link to {}: {reason}", shown(target)),
            })
        };
        let to = match lower.find(target) {
            Ok(Some(id)) => Target::Lower(id),
            _ => {
                let mut path = target;
                let mut steps = 0;
                loop {
                    let Ok(Some(id)) = upper.find(path) else {
                        return fail("there is no such file in this layer or below");
                    };
                    steps += 1;
                    match &upper.inode(id).body {
                        Body::Link(_) if steps > CHAIN_MAX => return fail("it leads to itself"),
                        Body::Link(next) => match lower.find(next) {
                            Ok(Some(id)) => break Target::Lower(id),
                            _ => path = next,
                        },
                        _ => break Target::Upper(id),
                    }
                }
            }
        };
        let body = match to {
            Target::Lower(id) => &lower.inode(id).body,
            Target::Upper(id) => &upper.inode(id).body,
        };
        if matches!(body, Body::Dir(_)) {
            return fail("it is a directory");
        }
        found.push((id, to));
    }
    Ok(found)
}

/// A layer on its way into the layers below it, all in one draft.
struct Merge<'d> {
    draft: &'d mut Draft,
    spec: WhiteoutSpec,
    /// What names of open hard links lead to.
    links: HashMap<InodeId, InodeId>,
    /// Directories of the layer that make nothing where nothing is.
    nothing: HashSet<InodeId>,
}

/// A directory with those it is in.
struct Above {
    dir: InodeId,
    above: Option<Rc<Above>>,
}

impl Above {
    fn new(dir: InodeId, above: Option<Rc<Above>>) -> Rc<Above> {
        Rc::new(Above { dir, above })
    }

    /// From the root to this directory.
    fn path(&self) -> Vec<InodeId> {
        let mut path = vec![self.dir];
        let mut next = self.above.as_deref();
        while let Some(above) = next {
            path.push(above.dir);
            next = above.above.as_deref();
        }
        path.reverse();
        path
    }
}

impl Drop for Above {
    fn drop(&mut self) {
        // A tree may be deeper than the stack.
        let mut next = self.above.take();
        while let Some(Ok(mut above)) = next.map(Rc::try_unwrap) {
            next = above.above.take();
        }
    }
}

impl Merge<'_> {
    fn run(mut self, upper_root: InodeId) -> Result<(), BuildError> {
        // Pairs of a directory and the layer's directory of that name. In a directory that is new
        // both are one, and there is nothing below to change.
        let mut todo = vec![(Above::new(InodeId::ROOT, None), upper_root)];
        while let Some((at, upper)) = todo.pop() {
            self.directory(&at, upper, &mut todo)?;
        }
        Ok(())
    }

    fn directory(
        &mut self,
        at: &Rc<Above>,
        upper: InodeId,
        todo: &mut Vec<(Rc<Above>, InodeId)>,
    ) -> Result<(), BuildError> {
        let lower = at.dir;
        let upper_dir = self.draft.dir_mut(upper);
        let mut opaque = std::mem::take(&mut upper_dir.opaque);
        let implied = upper_dir.implied;
        let entries = std::mem::take(&mut upper_dir.children);
        let mut attributes = self.draft.inode(upper).attributes.clone();
        if self.spec.take_opaque_mark(&mut attributes.xattrs) {
            opaque = true;
        }
        if !implied || lower == upper {
            self.draft.inode_mut(lower).attributes = attributes;
            self.draft.dir_mut(lower).implied = implied;
        }
        let mut new = Vec::with_capacity(entries.len());
        let mut removed = Vec::new();
        for (name, id) in entries {
            match self.spec.mark(&name, self.draft.inode(id)) {
                None => new.push((name, id)),
                Some(Mark::Opaque) => opaque = true,
                Some(Mark::Remove(name)) => removed.push(name),
                Some(Mark::Nothing) => {}
            }
        }
        let dir = self.draft.dir_mut(lower);
        if opaque {
            dir.children.clear();
        }
        for name in removed {
            dir.children.remove(&name);
        }
        for (name, id) in new {
            let id = self.links.get(&id).copied().unwrap_or(id);
            let Body::Dir(upper_dir) = &self.draft.inode(id).body else {
                self.draft.dir_mut(lower).children.insert(name, id);
                continue;
            };
            let follows = upper_dir.implied && !upper_dir.opaque;
            let old = self.draft.dir(lower).children.get(&name).copied();
            let old = old.map(|old| (old, &self.draft.inode(old).body));
            match old {
                Some((old, Body::Dir(_))) => todo.push((Above::new(old, Some(at.clone())), id)),
                Some((_, Body::Symlink(target))) if follows => {
                    let target = target.clone();
                    let path = self.draft.follow(&at.path(), &target).map_err(|e| e.at(&[name]))?;
                    let mut to = None;
                    for dir in path {
                        to = Some(Above::new(dir, to));
                    }
                    todo.push((to.expect("the root is on every path"), id));
                }
                _ if self.nothing.contains(&id) => {}
                _ => {
                    self.draft.dir_mut(lower).children.insert(name, id);
                    todo.push((Above::new(id, Some(at.clone())), id));
                }
            }
        }
        Ok(())
    }
}

impl Draft {
    /// Hard links that came before their targets, or whose targets are in lower layers.
    fn open_links(&self) -> impl Iterator<Item = (InodeId, &[Box<[u8]>])> {
        self.inodes().filter_map(|(id, inode)| match inode {
            Inode { body: Body::Link(target), .. } => Some((id, &target[..])),
            _ => None,
        })
    }
}

#[cfg(test)]
mod tests;
