//! Who may call what. One table lists every method; what is not in it, nobody may call.

use std::fmt;
use std::sync::Arc;

use tonic::Status;

use self::Who::{Anyone, Holders};
use Role::{Submitter, Trainer, Viewer, Worker};

/// What somebody is to the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, clap::ValueEnum)]
pub enum Role {
    /// Sees everything, changes nothing
    Viewer,
    /// Sees everything; creates and deletes datasets and runs
    Submitter,
    /// A fetch worker
    Worker,
    /// A trainer agent
    Trainer,
    /// May do whatever the others may
    Admin,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Viewer, Self::Submitter, Self::Worker, Self::Trainer, Self::Admin];

    /// As it stands in a file of tokens.
    pub fn name(self) -> &'static str {
        match self {
            Self::Viewer => "viewer",
            Self::Submitter => "submitter",
            Self::Worker => "worker",
            Self::Trainer => "trainer",
            Self::Admin => "admin",
        }
    }

    /// The role of that name.
    pub(crate) fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.name() == name)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Somebody who is known here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) name: Arc<str>,
    pub(crate) role: Role,
}

/// Who may call a method. An admin may call all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Who {
    /// Whoever reaches the port: the answer tells nothing of the cluster.
    Anyone,
    /// Who has one of these roles.
    Holders(&'static [Role]),
}

const SEE: Who = Holders(&[Viewer, Submitter]);
const CHANGE: Who = Holders(&[Submitter]);
const FETCH: Who = Holders(&[Worker]);
const TRAIN: Who = Holders(&[Trainer]);

/// Every method that is served, by its path.
const RULES: &[(&str, Who)] = &[
    ("/gleaner.v1.DatasetService/CreateDataset", CHANGE),
    ("/gleaner.v1.DatasetService/RefreshDataset", CHANGE),
    ("/gleaner.v1.DatasetService/ControlDataset", CHANGE),
    ("/gleaner.v1.DatasetService/DeleteDataset", CHANGE),
    ("/gleaner.v1.DatasetService/GetDataset", SEE),
    ("/gleaner.v1.DatasetService/ListDatasets", SEE),
    ("/gleaner.v1.DatasetService/WatchDataset", SEE),
    ("/gleaner.v1.DatasetService/GetManifest", SEE),
    ("/gleaner.v1.DatasetService/ReadObject", SEE),
    ("/gleaner.v1.RunService/SubmitRun", CHANGE),
    ("/gleaner.v1.RunService/SubmitRunWithWeights", CHANGE),
    ("/gleaner.v1.RunService/CancelRun", CHANGE),
    ("/gleaner.v1.RunService/ResumeRun", CHANGE),
    ("/gleaner.v1.RunService/DeleteRun", CHANGE),
    ("/gleaner.v1.RunService/GetRun", SEE),
    ("/gleaner.v1.RunService/ListRuns", SEE),
    ("/gleaner.v1.RunService/WatchRun", SEE),
    ("/gleaner.v1.RunService/GetLogs", SEE),
    ("/gleaner.v1.RunService/GetMetrics", SEE),
    ("/gleaner.v1.RunService/GetModelFile", SEE),
    ("/gleaner.v1.RunService/CompareRuns", SEE),
    ("/gleaner.v1.RunService/GetStatus", SEE),
    ("/gleaner.v1.FetchService/LeaseShard", FETCH),
    ("/gleaner.v1.FetchService/RenewLease", FETCH),
    ("/gleaner.v1.FetchService/CompleteShard", FETCH),
    ("/gleaner.v1.FetchService/ReleaseLease", FETCH),
    ("/gleaner.v1.FetchService/ShareSites", FETCH),
    ("/gleaner.v1.FetchService/ShareRules", FETCH),
    ("/gleaner.v1.TrainerService/Connect", TRAIN),
    ("/externalscaler.ExternalScaler/IsActive", SEE),
    ("/externalscaler.ExternalScaler/StreamIsActive", SEE),
    ("/externalscaler.ExternalScaler/GetMetricSpec", SEE),
    ("/externalscaler.ExternalScaler/GetMetrics", SEE),
    // Probes have no token. The other one stays open for as long as its callers like.
    ("/grpc.health.v1.Health/Check", Anyone),
    ("/grpc.health.v1.Health/Watch", SEE),
    ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", SEE),
];

/// Whether a method is there for whoever reaches the port.
pub(crate) fn is_open(method: &str) -> bool {
    RULES.iter().any(|(path, who)| *path == method && *who == Anyone)
}

/// Why somebody may not call a method.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// It is not in the table.
    Unlisted { method: String },
    /// Nobody has said who calls.
    NoToken { method: &'static str, wanted: &'static [Role] },
    /// The caller's role is another one.
    WrongRole { method: &'static str, wanted: &'static [Role], identity: Identity },
}

/// Decides whether a method may be called by somebody, or by whoever has said nothing of himself.
pub(crate) fn allowed(method: &str, identity: Option<&Identity>) -> Result<(), Refusal> {
    let Some((method, who)) = RULES.iter().find(|(path, _)| *path == method) else {
        return Err(Refusal::Unlisted { method: method.to_owned() });
    };
    match (who, identity) {
        (Anyone, _) => Ok(()),
        (Holders(wanted), None) => Err(Refusal::NoToken { method, wanted }),
        (Holders(wanted), Some(Identity { role, .. })) if *role == Role::Admin || wanted.contains(role) => Ok(()),
        (Holders(wanted), Some(identity)) => Err(Refusal::WrongRole { method, wanted, identity: identity.clone() }),
    }
}

/// `viewer, submitter or admin`
fn either(wanted: &[Role]) -> String {
    let names: Vec<&str> = wanted.iter().map(|role| role.name()).collect();
    format!("{} or admin", names.join(", "))
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unlisted { method } => {
                write!(f, "{method:?} is not served here: is the coordinator of another version than its caller?")
            }
            Self::NoToken { method, wanted } => write!(
                f,
                "{method} needs a token of the role {}: --token-file or GLEANER_TOKEN_FILE names the file that holds it; \
                 who runs the coordinator makes one by `gleaner token new --role {} --name NAME`",
                either(wanted),
                wanted[0]
            ),
            Self::WrongRole { method, wanted, identity: Identity { name, role } } => write!(
                f,
                "{name} is a {role}, and {method} needs the role {}: who runs the coordinator makes such a token by \
                 `gleaner token new --role {} --name NAME`",
                either(wanted),
                wanted[0]
            ),
        }
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        let message = refusal.to_string();
        match refusal {
            Refusal::Unlisted { .. } => Self::unimplemented(message),
            Refusal::NoToken { .. } => Self::unauthenticated(message),
            Refusal::WrongRole { .. } => Self::permission_denied(message),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn may(role: Role, method: &str) -> bool {
        allowed(method, Some(&Identity { name: "anna".into(), role })).is_ok()
    }

    #[test]
    fn what_is_not_in_the_table_is_refused_to_everybody() {
        for method in
            ["", "/", "/gleaner.v1.RunService/", "/gleaner.v1.RunService/New", "/gleaner.v1.runservice/getrun"]
        {
            assert!(matches!(allowed(method, None), Err(Refusal::Unlisted { .. })), "{method}");
            assert!(Role::ALL.into_iter().all(|role| !may(role, method)), "{method}");
        }
    }

    #[test]
    fn the_table_has_the_methods_that_are_served_and_no_others() {
        use prost::Message;
        let sets = [
            proto::pb::DESCRIPTORS,
            tonic_health::pb::FILE_DESCRIPTOR_SET,
            tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
        ];
        let files = sets.map(|set| prost_types::FileDescriptorSet::decode(set).expect("descriptors").file);
        let served = files.iter().flatten().flat_map(|file| {
            let path = move |service: &str, method: &str| format!("/{}.{service}/{method}", file.package());
            let methods = file.service.iter().flat_map(|service| service.method.iter().map(move |m| (service, m)));
            methods.map(move |(service, method)| path(service.name(), method.name()))
        });
        let served: BTreeSet<String> = served.collect();
        let table: BTreeSet<String> = RULES.iter().map(|(path, _)| (*path).to_owned()).collect();
        assert_eq!(table, served);
    }

    #[test]
    fn every_method_stands_once_and_only_the_probe_is_for_anyone() {
        let paths: BTreeSet<&str> = RULES.iter().map(|(path, _)| *path).collect();
        assert_eq!(paths.len(), RULES.len());
        let open: Vec<&str> = paths.into_iter().filter(|path| allowed(path, None).is_ok()).collect();
        assert_eq!(open, ["/grpc.health.v1.Health/Check"]);
    }

    #[test]
    fn viewers_change_nothing_submitters_do_no_workers_work_and_admins_do_everything() {
        for (method, who) in RULES {
            assert!(may(Role::Admin, method), "{method}");
            let by = |role| may(role, method);
            match who {
                Anyone => assert!(Role::ALL.into_iter().all(by), "{method}"),
                Holders(_) if *who == CHANGE => {
                    assert!(by(Submitter) && !by(Viewer) && !by(Worker) && !by(Trainer), "{method}");
                }
                Holders(_) => assert!(!(by(Viewer) && (by(Worker) || by(Trainer))), "{method}"),
            }
        }
        for method in ["LeaseShard", "RenewLease", "ReleaseLease"] {
            let method = format!("/gleaner.v1.FetchService/{method}");
            assert!(may(Worker, &method) && !may(Trainer, &method) && !may(Submitter, &method));
        }
    }

    #[test]
    fn a_refusal_says_which_role_is_needed_and_how_to_come_by_it() {
        let method = "/gleaner.v1.DatasetService/DeleteDataset";
        let nobody = Status::from(allowed(method, None).expect_err("no token"));
        assert_eq!(nobody.code(), tonic::Code::Unauthenticated);
        let viewer = Identity { name: "anna".into(), role: Viewer };
        let viewer = Status::from(allowed(method, Some(&viewer)).expect_err("the wrong role"));
        assert_eq!(viewer.code(), tonic::Code::PermissionDenied);
        for (refused, words) in [(&nobody, "GLEANER_TOKEN_FILE"), (&viewer, "anna is a viewer")] {
            let message = refused.message();
            assert!(message.contains(words) && message.contains("submitter or admin"), "{message}");
            assert!(message.contains("gleaner token new --role submitter"), "{message}");
        }
    }
}
