// Load from k6: `k6 run -e IMAGE=a.png -e OTHER=b.png load.js` verifies one pair as often and as much at once as --vus
// and --duration or --iterations say, over a connection for each virtual user. LOOKALIKE_TARGET, LOOKALIKE_TLS_CA and
// LOOKALIKE_API_KEY are read from the environment. Fails when a call does, but for those the server refuses as too many.
import grpc from "k6/net/grpc";
import { check } from "k6";
import encoding from "k6/encoding";
import { Counter } from "k6/metrics";

const client = new grpc.Client();
client.load(["../../proto", "../../third_party/googleapis"], "lookalike/v1/match.proto");
const request = {
  a: { encoded: encoding.b64encode(open(__ENV.IMAGE, "b")) },
  b: { encoded: encoding.b64encode(open(__ENV.OTHER, "b")) },
};
const target = __ENV.LOOKALIKE_TARGET || "127.0.0.1:50051";
const tls = __ENV.LOOKALIKE_TLS_CA ? { tls: { cacerts: [open(__ENV.LOOKALIKE_TLS_CA)] } } : { plaintext: true };
const metadata = __ENV.LOOKALIKE_API_KEY ? { authorization: `Bearer ${__ENV.LOOKALIKE_API_KEY}` } : {};
const refused = new Counter("refused");

export const options = { thresholds: { checks: ["rate==1"] } };

export default function () {
  if (__ITER === 0) client.connect(target, tls);
  const response = client.invoke("lookalike.v1.MatchService/Verify", request, { metadata, timeout: "30s" });
  if (response.status === grpc.StatusResourceExhausted) {
    refused.add(1);
    return;
  }
  check(response, {
    "answered with a decision": ({ status, message }) => status === grpc.StatusOK && message.decision.threshold > 0,
  });
}
