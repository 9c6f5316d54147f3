"""The library as it was founded: blueprints, builds, kernels, verdicts, work, leases, change log, keys."""

import secrets

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Create every table, and give the library its identity."""
    op.create_table(
        "blueprints",
        sa.Column("sequence", _BIG, autoincrement=False, nullable=False),
        sa.Column("id", sa.String(length=71), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("description", sa.String(length=512), nullable=False),
        sa.Column("ir", sa.LargeBinary(), nullable=False),
        sa.Column("layouts", sa.JSON(), nullable=False),
        sa.Column("birth", sa.String(length=16), nullable=False),
        sa.Column("causal", sa.Boolean(), nullable=False),
        sa.Column("tags", sa.JSON(), nullable=False),
        sa.Column("parent_ids", sa.JSON(), nullable=False),
        sa.Column("author", sa.String(length=160), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("create_time", _BIG, nullable=False),
        sa.PrimaryKeyConstraint("sequence", name=op.f("pk_blueprints")),
        sa.UniqueConstraint("id", name=op.f("uq_blueprints_id")),
    )
    op.create_index(op.f("ix_blueprints_name_sequence"), "blueprints", ["name", "sequence"], unique=False)
    op.create_index(op.f("ix_blueprints_state_sequence"), "blueprints", ["state", "sequence"], unique=False)
    op.create_table(
        "changes",
        sa.Column("sequence", _BIG, autoincrement=False, nullable=False),
        sa.Column("occur_time", _BIG, nullable=False),
        sa.Column("subject", sa.String(length=16), nullable=False),
        sa.Column("subject_id", sa.String(length=71), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("kernel_id", sa.String(length=71), nullable=False),
        sa.Column("error", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("sequence", name=op.f("pk_changes")),
    )
    op.create_table(
        "leases",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("subject_id", sa.String(length=71), nullable=False),
        sa.Column("holder", sa.String(length=128), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("lease_time_us", _BIG, nullable=False),
        sa.Column("expire_time", _BIG, nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("outcome", sa.String(length=64), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_leases")),
    )
    op.create_index(op.f("ix_leases_state_expire_time"), "leases", ["state", "expire_time"], unique=False)
    op.create_index(
        "uq_leases_active",
        "leases",
        ["kind", "subject_id"],
        unique=True,
        sqlite_where=sa.text("state = 'active'"),
        postgresql_where=sa.text("state = 'active'"),
    )
    op.create_table(
        "library",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("library_id", sa.String(length=32), nullable=False),
        sa.Column("sequence", _BIG, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_library")),
    )
    op.create_table(
        "signing_keys",
        sa.Column("key_id", sa.String(length=64), nullable=False),
        sa.Column("public_key", sa.LargeBinary(), nullable=False),
        sa.Column("create_time", _BIG, nullable=False),
        sa.Column("revoked", sa.Boolean(), nullable=False),
        sa.Column("registrar", sa.String(length=160), nullable=False),
        sa.PrimaryKeyConstraint("key_id", name=op.f("pk_signing_keys")),
    )
    op.create_table(
        "work",
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("subject_id", sa.String(length=71), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("urgency", sa.Integer(), nullable=False),
        sa.Column("position", _BIG, nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("error", sa.Text(), nullable=False),
        sa.Column("tier", sa.String(length=16), nullable=False),
        sa.Column("target", sa.String(length=128), nullable=False),
        sa.PrimaryKeyConstraint("kind", "subject_id", name=op.f("pk_work")),
    )
    op.create_index(
        op.f("ix_work_kind_state_urgency_position"), "work", ["kind", "state", "urgency", "position"], unique=False
    )
    op.create_table(
        "blueprint_labels",
        sa.Column("label", sa.String(length=64), nullable=False),
        sa.Column("sequence", _BIG, autoincrement=False, nullable=False),
        sa.ForeignKeyConstraint(["sequence"], ["blueprints.sequence"], name=op.f("fk_blueprint_labels_sequence")),
        sa.PrimaryKeyConstraint("label", "sequence", name=op.f("pk_blueprint_labels")),
    )
    op.create_table(
        "builds",
        sa.Column("sequence", _BIG, autoincrement=False, nullable=False),
        sa.Column("id", sa.String(length=71), nullable=False),
        sa.Column("blueprint_id", sa.String(length=71), nullable=False),
        sa.Column("signature", sa.String(length=64), nullable=False),
        sa.Column("target", sa.String(length=128), nullable=False),
        sa.Column("tier", sa.String(length=16), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("kernel_id", sa.String(length=71), nullable=False),
        sa.Column("error", sa.Text(), nullable=False),
        sa.Column("create_time", _BIG, nullable=False),
        sa.Column("update_time", _BIG, nullable=False),
        sa.ForeignKeyConstraint(["blueprint_id"], ["blueprints.id"], name=op.f("fk_builds_blueprint_id")),
        sa.PrimaryKeyConstraint("sequence", name=op.f("pk_builds")),
        sa.UniqueConstraint("id", name=op.f("uq_builds_id")),
    )
    op.create_index(op.f("ix_builds_blueprint_id_state"), "builds", ["blueprint_id", "state"], unique=False)
    op.create_index(op.f("ix_builds_state_sequence"), "builds", ["state", "sequence"], unique=False)
    op.create_table(
        "kernels",
        sa.Column("sequence", _BIG, autoincrement=False, nullable=False),
        sa.Column("id", sa.String(length=71), nullable=False),
        sa.Column("build_id", sa.String(length=71), nullable=False),
        sa.Column("blueprint_id", sa.String(length=71), nullable=False),
        sa.Column("blueprint_name", sa.String(length=64), nullable=False),
        sa.Column("signature", sa.String(length=64), nullable=False),
        sa.Column("tier", sa.String(length=16), nullable=False),
        sa.Column("target", sa.String(length=128), nullable=False),
        sa.Column("birth", sa.String(length=16), nullable=False),
        sa.Column("causal", sa.Boolean(), nullable=False),
        sa.Column("parameters", _BIG, nullable=False),
        sa.Column("flops_per_position", _BIG, nullable=False),
        sa.Column("size_bytes", _BIG, nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("latency_us", sa.Double(), nullable=True),
        sa.Column("memory_bytes", sa.Double(), nullable=True),
        sa.Column("create_time", _BIG, nullable=False),
        sa.Column("update_time", _BIG, nullable=False),
        sa.ForeignKeyConstraint(["blueprint_id"], ["blueprints.id"], name=op.f("fk_kernels_blueprint_id")),
        sa.ForeignKeyConstraint(["build_id"], ["builds.id"], name=op.f("fk_kernels_build_id")),
        sa.PrimaryKeyConstraint("sequence", name=op.f("pk_kernels")),
        sa.UniqueConstraint("id", name=op.f("uq_kernels_id")),
    )
    op.create_index(op.f("ix_kernels_blueprint_id_sequence"), "kernels", ["blueprint_id", "sequence"], unique=False)
    op.create_index(op.f("ix_kernels_build_id"), "kernels", ["build_id"], unique=False)
    op.create_index(
        op.f("ix_kernels_signature_state_sequence"), "kernels", ["signature", "state", "sequence"], unique=False
    )
    op.create_index(op.f("ix_kernels_state_sequence"), "kernels", ["state", "sequence"], unique=False)
    op.create_table(
        "kernel_tags",
        sa.Column("tag", sa.String(length=48), nullable=False),
        sa.Column("sequence", _BIG, autoincrement=False, nullable=False),
        sa.ForeignKeyConstraint(["sequence"], ["kernels.sequence"], name=op.f("fk_kernel_tags_sequence")),
        sa.PrimaryKeyConstraint("tag", "sequence", name=op.f("pk_kernel_tags")),
    )
    op.create_table(
        "transitions",
        sa.Column("kernel_id", sa.String(length=71), nullable=False),
        sa.Column("sequence", _BIG, autoincrement=False, nullable=False),
        sa.Column("from_state", sa.String(length=16), nullable=True),
        sa.Column("to_state", sa.String(length=16), nullable=False),
        sa.Column("identity", sa.String(length=128), nullable=False),
        sa.Column("reason", sa.String(length=1024), nullable=False),
        sa.Column("occur_time", _BIG, nullable=False),
        sa.ForeignKeyConstraint(["kernel_id"], ["kernels.id"], name=op.f("fk_transitions_kernel_id")),
        sa.PrimaryKeyConstraint("kernel_id", "sequence", name=op.f("pk_transitions")),
    )
    op.create_table(
        "verdicts",
        sa.Column("kernel_id", sa.String(length=71), nullable=False),
        sa.Column("statement", sa.LargeBinary(), nullable=False),
        sa.Column("signature", sa.LargeBinary(), nullable=False),
        sa.Column("key_id", sa.String(length=64), nullable=False),
        sa.ForeignKeyConstraint(["kernel_id"], ["kernels.id"], name=op.f("fk_verdicts_kernel_id")),
        sa.PrimaryKeyConstraint("kernel_id", name=op.f("pk_verdicts")),
    )
    # ### end Alembic commands ###
    row = sa.table("library", sa.column("id"), sa.column("library_id"), sa.column("sequence"))
    op.execute(row.insert().values(id=1, library_id=secrets.token_hex(16), sequence=0))


def downgrade() -> None:
    """Remove everything."""
    op.drop_table("verdicts")
    op.drop_table("transitions")
    op.drop_table("kernel_tags")
    op.drop_table("kernels")
    op.drop_table("builds")
    op.drop_table("blueprint_labels")
    op.drop_table("work")
    op.drop_table("signing_keys")
    op.drop_table("library")
    op.drop_table("leases")
    op.drop_table("changes")
    op.drop_table("blueprints")
    # ### end Alembic commands ###
