"""Tables of the library, in SQL that SQLite and PostgreSQL share.

Times are microseconds since the epoch in UTC. A record's `sequence` is the number of the change that stored it: unique,
rising in the order of commits, and therefore the key by which listings are ordered and paged.
"""

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
)

__all__ = [
    "METADATA",
    "blueprint_labels",
    "blueprints",
    "builds",
    "changes",
    "kernel_tags",
    "kernels",
    "leases",
    "library",
    "signing_keys",
    "transitions",
    "verdicts",
    "work",
]

# SQLite's own 64-bit row number only stands behind the very type INTEGER.
_BIG = BigInteger().with_variant(Integer(), "sqlite")
_ID = String(71)

METADATA = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

library = Table(
    "library",
    METADATA,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("library_id", String(32), nullable=False),
    Column("sequence", _BIG, nullable=False),
)
"""One row: who this library is, and the number of its last change. Every writer locks it, so writers take turns and
numbers are given in the order of commits, without gaps."""

blueprints = Table(
    "blueprints",
    METADATA,
    Column("sequence", _BIG, primary_key=True, autoincrement=False),
    Column("id", _ID, nullable=False, unique=True),
    Column("name", String(64), nullable=False),
    Column("description", String(512), nullable=False),
    Column("ir", LargeBinary, nullable=False),
    Column("layouts", JSON, nullable=False),
    Column("birth", String(16), nullable=False),
    Column("causal", Boolean, nullable=False),
    Column("tags", JSON, nullable=False),
    Column("parent_ids", JSON, nullable=False),
    Column("author", String(160), nullable=False),
    Column("state", String(16), nullable=False),
    Column("create_time", _BIG, nullable=False),
    Index(None, "name", "sequence"),
    Index(None, "state", "sequence"),
)

blueprint_labels = Table(
    "blueprint_labels",
    METADATA,
    Column("label", String(64), primary_key=True),
    Column("sequence", _BIG, ForeignKey("blueprints.sequence"), primary_key=True, autoincrement=False),
)
"""`layout:image`, `tag:conv`: what ListBlueprints asks for."""

builds = Table(
    "builds",
    METADATA,
    Column("sequence", _BIG, primary_key=True, autoincrement=False),
    Column("id", _ID, nullable=False, unique=True),
    Column("blueprint_id", _ID, ForeignKey("blueprints.id"), nullable=False),
    Column("signature", String(64), nullable=False),
    Column("target", String(128), nullable=False),
    Column("tier", String(16), nullable=False),
    Column("priority", Integer, nullable=False),
    Column("state", String(16), nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("kernel_id", _ID, nullable=False),
    Column("error", Text, nullable=False),
    Column("create_time", _BIG, nullable=False),
    Column("update_time", _BIG, nullable=False),
    Index(None, "state", "sequence"),
    Index(None, "blueprint_id", "state"),
)

kernels = Table(
    "kernels",
    METADATA,
    Column("sequence", _BIG, primary_key=True, autoincrement=False),
    Column("id", _ID, nullable=False, unique=True),
    Column("build_id", _ID, ForeignKey("builds.id"), nullable=False),
    Column("blueprint_id", _ID, ForeignKey("blueprints.id"), nullable=False),
    Column("blueprint_name", String(64), nullable=False),
    Column("signature", String(64), nullable=False),
    Column("tier", String(16), nullable=False),
    Column("target", String(128), nullable=False),
    Column("birth", String(16), nullable=False),
    Column("causal", Boolean, nullable=False),
    Column("parameters", _BIG, nullable=False),
    Column("flops_per_position", _BIG, nullable=False),
    Column("size_bytes", _BIG, nullable=False),
    Column("state", String(16), nullable=False),
    Column("latency_us", Double),
    Column("memory_bytes", Double),
    Column("create_time", _BIG, nullable=False),
    Column("update_time", _BIG, nullable=False),
    Index(None, "state", "sequence"),
    Index(None, "signature", "state", "sequence"),
    Index(None, "blueprint_id", "sequence"),
    Index(None, "build_id"),
)

verdicts = Table(
    "verdicts",
    METADATA,
    Column("kernel_id", _ID, ForeignKey("kernels.id"), primary_key=True),
    Column("statement", LargeBinary, nullable=False),
    Column("signature", LargeBinary, nullable=False),
    Column("key_id", String(64), nullable=False),
)

kernel_tags = Table(
    "kernel_tags",
    METADATA,
    Column("tag", String(48), primary_key=True),
    Column("sequence", _BIG, ForeignKey("kernels.sequence"), primary_key=True, autoincrement=False),
)
"""Tags of the blueprint, from the upload on, and of the verdict, once there is one."""

transitions = Table(
    "transitions",
    METADATA,
    Column("kernel_id", _ID, ForeignKey("kernels.id"), primary_key=True),
    Column("sequence", _BIG, primary_key=True, autoincrement=False),
    Column("from_state", String(16)),
    Column("to_state", String(16), nullable=False),
    Column("identity", String(128), nullable=False),
    Column("reason", String(1024), nullable=False),
    Column("occur_time", _BIG, nullable=False),
)

work = Table(
    "work",
    METADATA,
    Column("kind", String(16), primary_key=True),
    Column("subject_id", _ID, primary_key=True),
    Column("state", String(16), nullable=False),
    Column("urgency", Integer, nullable=False),
    Column("position", _BIG, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("error", Text, nullable=False),
    Column("tier", String(16), nullable=False),
    Column("target", String(128), nullable=False),
    # `urgency` is the negated priority: an index in one direction serves "highest priority first, then oldest".
    Index(None, "kind", "state", "urgency", "position"),
)

leases = Table(
    "leases",
    METADATA,
    Column("id", String(32), primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("subject_id", _ID, nullable=False),
    Column("holder", String(128), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("lease_time_us", _BIG, nullable=False),
    Column("expire_time", _BIG, nullable=False),
    Column("state", String(16), nullable=False),
    Column("outcome", String(64), nullable=False),
    Index(None, "state", "expire_time"),
)
Index(
    "uq_leases_active",
    leases.c.kind,
    leases.c.subject_id,
    unique=True,
    sqlite_where=leases.c.state == "active",
    postgresql_where=leases.c.state == "active",
)

changes = Table(
    "changes",
    METADATA,
    Column("sequence", _BIG, primary_key=True, autoincrement=False),
    Column("occur_time", _BIG, nullable=False),
    Column("subject", String(16), nullable=False),
    Column("subject_id", _ID, nullable=False),
    Column("state", String(16), nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("kernel_id", _ID, nullable=False),
    Column("error", Text, nullable=False),
)
"""Only what can change is kept per change; the rest of a subject is immutable and joined when the log is read."""

signing_keys = Table(
    "signing_keys",
    METADATA,
    Column("key_id", String(64), primary_key=True),
    Column("public_key", LargeBinary, nullable=False),
    Column("create_time", _BIG, nullable=False),
    Column("revoked", Boolean, nullable=False),
    Column("registrar", String(160), nullable=False),
)
