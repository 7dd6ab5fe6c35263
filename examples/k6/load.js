// Load from k6: `k6 run -e IMAGE=a.png -e OTHER=b.png load.js` verifies one pair as often and as much at once as --vus
// and --duration or --iterations say, over a connection for each virtual user; with `-e GALLERY=shop` each time is followed
// by a search for the first image there. LOOKALIKE_TARGET, LOOKALIKE_TLS_CA and LOOKALIKE_API_KEY are read from the
// environment. Fails when a call does, but for those the server refuses as too many.
import grpc from "k6/net/grpc";
import { check } from "k6";
import encoding from "k6/encoding";
import { Counter } from "k6/metrics";

const client = new grpc.Client();
client.load(["../../proto", "../../third_party/googleapis"], "lookalike/v1/match.proto", "lookalike/v1/search.proto");
const [image, other] = [__ENV.IMAGE, __ENV.OTHER].map((path) => ({ encoded: encoding.b64encode(open(path, "b")) }));
const calls = [
  {
    method: "lookalike.v1.MatchService/Verify",
    request: { a: image, b: other },
    passes: { "verified with a decision": ({ status, message }) => status === grpc.StatusOK && message.decision.threshold > 0 },
  },
];
if (__ENV.GALLERY) {
  calls.push({
    method: "lookalike.v1.SearchService/Search",
    request: { gallery: `galleries/${__ENV.GALLERY}`, query: image, k: 10 },
    passes: { "found a neighbour": ({ status, message }) => status === grpc.StatusOK && message.neighbors.length > 0 },
  });
}
const target = __ENV.LOOKALIKE_TARGET || "127.0.0.1:50051";
const tls = __ENV.LOOKALIKE_TLS_CA ? { tls: { cacerts: [open(__ENV.LOOKALIKE_TLS_CA)] } } : { plaintext: true };
const metadata = __ENV.LOOKALIKE_API_KEY ? { authorization: `Bearer ${__ENV.LOOKALIKE_API_KEY}` } : {};
const refused = new Counter("refused");

export const options = { thresholds: { checks: ["rate==1"] } };

export default function () {
  if (__ITER === 0) client.connect(target, tls);
  for (const { method, request, passes } of calls) {
    const response = client.invoke(method, request, { metadata, timeout: "30s" });
    if (response.status === grpc.StatusResourceExhausted) {
      refused.add(1);
    } else {
      check(response, passes);
    }
  }
}
