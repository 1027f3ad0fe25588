//! Names of users and groups, as `/etc/passwd` and `/etc/group` have them.
//!
//! No other source is asked: a guard that waits for a directory service is one
//! that a network can stop. A policy can give numbers instead.

use std::collections::HashMap;

/// The numbers of users and groups by name.
#[derive(Debug, Default)]
pub(crate) struct Names {
    users: HashMap<String, u32>,
    groups: HashMap<String, u32>,
}

impl Names {
    /// Those of this machine. A file that cannot be read has none.
    pub(crate) fn of_machine() -> Self {
        let read = |path| parse(&std::fs::read_to_string(path).unwrap_or_default());
        Self {
            users: read("/etc/passwd"),
            groups: read("/etc/group"),
        }
    }

    pub(crate) fn user(&self, name: &str) -> Option<u32> {
        self.users.get(name).copied()
    }

    pub(crate) fn group(&self, name: &str) -> Option<u32> {
        self.groups.get(name).copied()
    }
}

/// A user of this machine, with its groups.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    /// The number of the user.
    pub uid: u32,
    /// The group in `/etc/passwd`, and those of `/etc/group`.
    pub groups: Vec<u32>,
}

impl Account {
    /// Finds a user by name or number. A number that is in no file has no groups.
    #[must_use]
    pub fn find(user: &str) -> Option<Self> {
        let read = |path| std::fs::read_to_string(path).unwrap_or_default();
        Self::find_in(user, &read("/etc/passwd"), &read("/etc/group"))
    }

    fn find_in(user: &str, passwd: &str, group: &str) -> Option<Self> {
        let entry = passwd.lines().find_map(|line| {
            let fields: Vec<_> = line.split(':').collect();
            let (name, uid, gid) = (fields.first()?, fields.get(2)?, fields.get(3)?);
            let (uid, gid): (u32, u32) = (uid.parse().ok()?, gid.parse().ok()?);
            (*name == user || user.parse() == Ok(uid)).then(|| (name.to_string(), uid, gid))
        });
        let Some((name, uid, gid)) = entry else {
            let uid = user.parse().ok()?;
            return Some(Self {
                uid,
                groups: Vec::new(),
            });
        };
        let mut groups = vec![gid];
        for line in group.lines() {
            let fields: Vec<_> = line.split(':').collect();
            if let (Some(Ok(gid)), Some(members)) =
                (fields.get(2).map(|f| f.parse()), fields.get(3))
                && members.split(',').any(|member| member == name)
                && !groups.contains(&gid)
            {
                groups.push(gid);
            }
        }
        Some(Self { uid, groups })
    }
}

/// The number of a user, given as a number or a name.
#[must_use]
pub fn user_number(text: &str) -> Option<u32> {
    text.parse().ok().or_else(|| Names::of_machine().user(text))
}

/// The number of a group, given as a number or a name.
#[must_use]
pub fn group_number(text: &str) -> Option<u32> {
    text.parse()
        .ok()
        .or_else(|| Names::of_machine().group(text))
}

/// The names and numbers of a file whose lines are `name:password:number:...`.
fn parse(text: &str) -> HashMap<String, u32> {
    let mut all = HashMap::new();
    for line in text.lines() {
        let mut fields = line.split(':');
        if let (Some(name), Some(number)) = (fields.next(), fields.nth(1))
            && let Ok(number) = number.parse()
            && !name.is_empty()
        {
            // The first one counts, as in getpwnam(3).
            all.entry(name.to_owned()).or_insert(number);
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_account_has_all_its_groups() {
        let passwd = "root:x:0:0::/:/bin/sh\nu:x:1000:100::/:/bin/sh\n";
        let group = "users:x:100:\ndba:x:7:a,u\nx:x:8:uu\nusers2:x:100:u\nbad:x:y:u\n";
        let found = |user| Account::find_in(user, passwd, group);
        let expected = Account {
            uid: 1000,
            groups: vec![100, 7],
        };
        assert_eq!(found("u"), Some(expected.clone()));
        assert_eq!(found("1000"), Some(expected));
        assert_eq!(found("nobody-here"), None);
        let other = found("55").unwrap();
        assert_eq!((other.uid, other.groups.len()), (55, 0));
        assert_eq!(
            (user_number("17"), user_number("root")),
            (Some(17), Some(0))
        );
        assert_eq!(
            (group_number("17"), group_number("root")),
            (Some(17), Some(0))
        );
    }

    #[test]
    fn the_first_of_a_name_counts() {
        let all = parse("root:x:0:0::/root:/bin/sh\n\n:x:5\nbad:x:y:\na:x:7:\na:x:8:\nshort\n");
        assert_eq!(all.len(), 2);
        assert_eq!((all["root"], all["a"]), (0, 7));
        assert_eq!(Names::of_machine().user("root"), Some(0));
        assert_eq!(Names::of_machine().group("root"), Some(0));
    }
}
