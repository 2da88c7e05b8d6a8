//! Join tokens: `SECRET.FINGERPRINT`, both in hexadecimal digits.
//!
//! The secret (128 bits) lets one node in; only its SHA-256 is stored. The fingerprint is the SHA-256 of the authority's
//! certificate, by which the node that joins knows that it talks to this cluster before it tells the secret.

use std::fmt;
use std::str::FromStr;

use aws_lc_rs::rand;
use thiserror::Error;

use super::{IdentityError, hex, sha256_hex};

const SECRET_BYTES: usize = 16;
const FINGERPRINT_DIGITS: usize = 64;

/// A token. Printing it needs [`Token::reveal`].
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    secret: String,
    authority_sha256: String,
}

/// Text that is no token. The text is not repeated: it may be most of a secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("that is not a join token as `ashlar cluster token` prints it")]
pub struct TokenError;

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

impl Token {
    /// A new one for the cluster with this authority.
    pub fn generate(authority_sha256: &str) -> Result<Token, IdentityError> {
        let mut secret = [0; SECRET_BYTES];
        rand::fill(&mut secret).map_err(|_| IdentityError::Unusable {
            reason: "no random numbers".to_owned(),
        })?;
        Ok(Token {
            secret: hex(&secret),
            authority_sha256: authority_sha256.to_owned(),
        })
    }

    /// The secret, hexadecimal digits.
    pub fn secret(&self) -> &str {
        &self.secret
    }

    /// Digest of the certificate of the authority to believe, hexadecimal digits.
    pub fn authority_sha256(&self) -> &str {
        &self.authority_sha256
    }

    /// What is stored of a secret.
    pub fn secret_sha256(secret: &str) -> String {
        sha256_hex(secret.as_bytes())
    }

    /// For the one who asked for it.
    pub fn reveal(&self) -> String {
        format!("{}.{}", self.secret, self.authority_sha256)
    }
}

impl FromStr for Token {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Token, TokenError> {
        let (secret, authority_sha256) = text.split_once('.').ok_or(TokenError)?;
        let is_hex = |part: &str, digits: usize| {
            part.len() == digits
                && part
                    .bytes()
                    .all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
        };
        if !is_hex(secret, 2 * SECRET_BYTES) || !is_hex(authority_sha256, FINGERPRINT_DIGITS) {
            return Err(TokenError);
        }
        Ok(Token {
            secret: secret.to_owned(),
            authority_sha256: authority_sha256.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_read_back_and_never_printed() {
        let digest = sha256_hex(b"authority");
        let token = Token::generate(&digest).expect("a token");
        assert_eq!(token.reveal().parse(), Ok(token.clone()));
        assert_ne!(Token::generate(&digest).expect("a token"), token);
        assert!(!format!("{token:?}").contains(token.secret()));
        for wrong in [
            "",
            ".",
            "ab.cd",
            &token.reveal()[1..],
            &token.reveal().to_uppercase(),
        ] {
            assert!(wrong.parse::<Token>().is_err());
        }
    }
}
