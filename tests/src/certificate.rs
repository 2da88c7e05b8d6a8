//! Certificates of the tests' own making: right ones for etcd, wrong ones for the daemon.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType, date_time_ymd,
};

/// An authority that signs what a test asks for.
pub struct Authority {
    certificate: Certificate,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate and its key, as files in PEM.
#[derive(Clone, Debug)]
pub struct Files {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

impl Authority {
    pub fn new(name: &str) -> Authority {
        Authority::with(name, KeyPair::generate().expect("a key"))
    }

    /// One of a name and a key (PEM) that are known.
    pub fn of_key(name: &str, key: &str) -> Authority {
        Authority::with(name, KeyPair::from_pem(key).expect("a key"))
    }

    fn with(name: &str, key: KeyPair) -> Authority {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![
            KeyUsagePurpose::KeyCertSign,
            KeyUsagePurpose::DigitalSignature,
        ];
        params.distinguished_name.push(DnType::CommonName, name);
        let certificate = params.self_signed(&key).expect("a certificate");
        Authority {
            certificate,
            issuer: Issuer::new(params, key),
        }
    }

    /// Its own certificate, into a file.
    pub fn write(&self, path: &Path) -> PathBuf {
        std::fs::write(path, self.certificate.pem()).expect("a file");
        path.to_owned()
    }

    pub fn pem(&self) -> String {
        self.certificate.pem()
    }

    /// A certificate for 127.0.0.1, localhost and `names`, for clients and servers, into `directory`.
    pub fn issue(&self, directory: &Path, file: &str, names: &[&str], expired: bool) -> Files {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, file);
        params.subject_alt_names = vec![SanType::IpAddress(IpAddr::from([127, 0, 0, 1]))];
        for name in names.iter().chain(&["localhost"]) {
            let name = (*name).try_into().expect("a DNS name");
            params.subject_alt_names.push(SanType::DnsName(name));
        }
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ClientAuth,
            ExtendedKeyUsagePurpose::ServerAuth,
        ];
        if expired {
            params.not_before = date_time_ymd(2020, 1, 1);
            params.not_after = date_time_ymd(2021, 1, 1);
        }
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("a certificate");
        let files = Files {
            certificate: directory.join(format!("{file}-cert.pem")),
            key: directory.join(format!("{file}-key.pem")),
        };
        std::fs::write(&files.certificate, certificate.pem()).expect("a file");
        std::fs::write(&files.key, key.serialize_pem()).expect("a file");
        files
    }
}
