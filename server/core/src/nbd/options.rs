//! The data of options: from unverified bytes to something with a meaning.

use super::wire::MAX_STRING_BYTES;

/// The data do not have the shape this option must have. The text says which rule was broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Malformed(pub(super) &'static str);

/// The data of INFO and GO.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct InfoRequest {
    pub(super) name: String,
    /// Information types asked for, in order; may hold unknown ones and repeats.
    pub(super) types: Vec<u16>,
}

/// The data of LIST_META_CONTEXT and SET_META_CONTEXT.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct MetaRequest {
    pub(super) name: String,
    pub(super) queries: Vec<String>,
}

/// Checks a string: at most 4096 bytes, UTF-8, no NUL.
pub(super) fn text(bytes: &[u8]) -> Result<&str, Malformed> {
    if bytes.len() > MAX_STRING_BYTES {
        return Err(Malformed("a string is longer than 4096 bytes"));
    }
    if bytes.contains(&0) {
        return Err(Malformed("a string contains a NUL"));
    }
    std::str::from_utf8(bytes).map_err(|_| Malformed("a string is not UTF-8"))
}

/// Cuts big-endian numbers and strings off the front.
struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (first, rest) = self
            .0
            .split_first_chunk::<N>()
            .ok_or(Malformed("the option's data end too early"))?;
        self.0 = rest;
        Ok(*first)
    }

    fn u16(&mut self) -> Result<u16, Malformed> {
        self.take().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Result<u32, Malformed> {
        self.take().map(u32::from_be_bytes)
    }

    /// A string preceded by its length in four bytes.
    fn string(&mut self) -> Result<&'a str, Malformed> {
        let length = self.u32()? as usize;
        let (string, rest) = self
            .0
            .split_at_checked(length)
            .ok_or(Malformed("a string is longer than the option"))?;
        self.0 = rest;
        text(string)
    }

    fn end(self) -> Result<(), Malformed> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(Malformed("bytes are left over behind the option's data"))
        }
    }
}

impl InfoRequest {
    pub(super) fn parse(data: &[u8]) -> Result<InfoRequest, Malformed> {
        let mut cursor = Cursor(data);
        let name = cursor.string()?;
        let count = usize::from(cursor.u16()?);
        // The count is checked against the data before it sizes anything.
        if cursor.0.len() != 2 * count {
            return Err(Malformed(
                "the number of information types does not fit the option",
            ));
        }
        let types = cursor
            .0
            .chunks_exact(2)
            .map(|pair| u16::from_be_bytes([pair[0], pair[1]]))
            .collect();
        Ok(InfoRequest {
            name: name.to_owned(),
            types,
        })
    }
}

impl MetaRequest {
    pub(super) fn parse(data: &[u8]) -> Result<MetaRequest, Malformed> {
        let mut cursor = Cursor(data);
        let name = cursor.string()?.to_owned();
        let count = cursor.u32()? as usize;
        if cursor.0.len() / 4 < count {
            return Err(Malformed("more queries than the option can hold"));
        }
        let mut queries = Vec::with_capacity(count);
        for _ in 0..count {
            queries.push(cursor.string()?.to_owned());
        }
        cursor.end()?;
        Ok(MetaRequest { name, queries })
    }
}
