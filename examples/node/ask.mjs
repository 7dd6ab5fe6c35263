// Asks a lookalike server from Node: `node ask.mjs GALLERY IMAGE OTHER` makes the gallery, and deletes it in the end.
// LOOKALIKE_TARGET names the server, LOOKALIKE_TLS_CA the roots to trust, LOOKALIKE_API_KEY the key.
// Prints a line of JSON for each answer.
import { readFileSync } from "node:fs";
import { randomUUID } from "node:crypto";
import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";
import protobuf from "protobufjs";

const includeDirs = ["../../proto", "../../third_party/googleapis", "../protos"].map((path) =>
  fileURLToPath(new URL(path, import.meta.url)),
);
const files = ["match", "search", "gallery"].map((name) => `lookalike/v1/${name}.proto`);
const loaded = grpc.loadPackageDefinition(
  protoLoader.loadSync([...files, "grpc/health/v1/health.proto"], {
    includeDirs,
    keepCase: true,
    longs: Number,
    enums: String,
    defaults: true,
  }),
);
const { v1 } = loaded.lookalike;

const target = process.env.LOOKALIKE_TARGET ?? "127.0.0.1:50051";
const ca = process.env.LOOKALIKE_TLS_CA;
const credentials = ca ? grpc.credentials.createSsl(readFileSync(ca)) : grpc.credentials.createInsecure();
const options = {
  // Repeats what ends with UNAVAILABLE, writes too: each carries a request_id, under which it is done once.
  "grpc.service_config": JSON.stringify({
    methodConfig: [
      {
        name: ["Match", "Search", "Gallery"].map((name) => ({ service: `lookalike.v1.${name}Service` })),
        retryPolicy: {
          maxAttempts: 4,
          initialBackoff: "0.1s",
          maxBackoff: "2s",
          backoffMultiplier: 3,
          retryableStatusCodes: ["UNAVAILABLE"],
        },
      },
    ],
    retryThrottling: { maxTokens: 20, tokenRatio: 0.5 },
  }),
};
const match = new v1.MatchService(target, credentials, options);
const search = new v1.SearchService(target, credentials, options);
const galleries = new v1.GalleryService(target, credentials, options);

const health = new loaded.grpc.health.v1.Health(target, credentials, options);

const withKey = new grpc.Metadata();
if (process.env.LOOKALIKE_API_KEY) withKey.set("authorization", `Bearer ${process.env.LOOKALIKE_API_KEY}`);

const deadline = () => ({ deadline: Date.now() + 30_000 });

const call = (client, method, request, metadata = withKey) =>
  new Promise((resolve, reject) =>
    client[method](request, metadata, deadline(), (error, response) => (error ? reject(error) : resolve(response))),
  );

const details = new protobuf.Root();
details.resolvePath = (_, path) => (path.startsWith("google/rpc/") ? `${includeDirs[1]}/${path}` : path);
details.loadSync(["google/rpc/status.proto", "google/rpc/error_details.proto"]);
const [Status, ErrorInfo] = ["Status", "ErrorInfo"].map((name) => details.lookupType(`google.rpc.${name}`));

/** The reason that a google.rpc.Status carries, such as INVALID_IMAGE: it is stable, as the message is not. */
function reason(status) {
  const info = status.details.find((detail) => detail.type_url.endsWith("/google.rpc.ErrorInfo"));
  return info ? ErrorInfo.decode(info.value).reason : "";
}

async function failing(step, promise) {
  try {
    await promise;
  } catch (error) {
    const [bytes] = error.metadata.get("grpc-status-details-bin");
    return show(step, { code: grpc.status[error.code], reason: bytes ? reason(Status.decode(bytes)) : "" });
  }
  throw new Error(`${step}: the call should have failed`);
}

/** Decides pairs over one call, never more than `window` of them ahead of the answers, which come in order. */
async function verifyStream(pairs, window = 256) {
  const stream = match.streamVerify(withKey, deadline());
  const results = [];
  let answered = () => {};
  const ended = new Promise((resolve, reject) => {
    stream.on("data", (result) => (results.push(result), answered()));
    stream.on("end", resolve);
    stream.on("error", reject);
  });
  const write = (message) => new Promise((resolve) => stream.write(message, resolve)); // as flow control allows
  const send = async () => {
    await write({ config: {} });
    let sent = 0;
    for (const pair of pairs) {
      while (sent - results.length >= window) await new Promise((resolve) => (answered = resolve));
      await write({ pair });
      sent += 1;
    }
    stream.end();
  };
  await Promise.all([ended, send()]);
  return results;
}

const show = (step, values) => console.log(JSON.stringify({ step, ...values }));
const decided = ({ verdict, distance }) => ({ verdict, distance });
const found = ({ neighbors }) => ({ items: neighbors.map(({ item }) => item.split("/").at(-1)) });

const [gallery, ...paths] = process.argv.slice(2);
const [image, other] = paths.map((path) => ({ encoded: readFileSync(path) }));
const parent = `galleries/${gallery}`;
const newItem = (id, image, metadata) => ({
  item: { name: `${parent}/items/${id}`, identity: id, metadata: { fields: metadata } },
  image,
  allow_missing: true,
  request_id: randomUUID(),
});

show("health", await call(health, "check", {}));
show("verify", decided((await call(match, "verify", { a: image, b: other })).decision));

await call(galleries, "createGallery", { gallery_id: gallery, request_id: randomUUID() });
await call(galleries, "updateItem", newItem("one", image, { n: { numberValue: 1 } }));
await call(galleries, "updateItem", newItem("two", other, { n: { numberValue: 2 } }));
const read = await call(galleries, "getItem", { name: `${parent}/items/two` });
show("written", { identity: read.item.identity, n: read.item.metadata.fields.n.numberValue });

show("search by image", found(await call(search, "search", { gallery: parent, query: image, k: 2 })));
const { embedding } = await call(match, "embed", { image: other });
show("search by vector", found(await call(search, "search", { gallery: parent, query: { embedding }, k: 1 })));
const filtered = { gallery: parent, query: image, filter: "metadata.n > 1" };
show("filter", found(await call(search, "search", filtered)));

const pairs = [{ a: image, b: image }, { a: image, b: { encoded: Buffer.from("no image") } }];
const results = [];
for (const result of await verifyStream([...pairs, ...Array(98).fill({ a: image, b: other })], 16))
  results.push(result.error ? { reason: reason(result.error) } : decided(result.decision));
show("stream", { count: results.length, results: results.slice(0, 3) });

await failing("error", call(match, "verify", { a: image, b: { encoded: Buffer.from("no image") } }));
if (process.env.LOOKALIKE_API_KEY)
  await failing("without a key", call(match, "verify", { a: image, b: other }, new grpc.Metadata()));

await call(galleries, "deleteGallery", { name: parent, force: true, request_id: randomUUID() });
