// An OpenID Connect provider on loopback for tests/proofs/identity.py. Each start makes a new signing key.
import { generateKeyPairSync, randomBytes } from "node:crypto";
import Provider from "oidc-provider";

const [port, redirectUri] = process.argv.slice(2);
const issuer = `http://127.0.0.1:${port}`;
const key = generateKeyPairSync("rsa", { modulusLength: 2048 }).privateKey.export({ format: "jwk" });
const provider = new Provider(issuer, {
  jwks: { keys: [{ ...key, kid: randomBytes(8).toString("hex"), use: "sig", alg: "RS256" }] },
  cookies: { keys: [randomBytes(16).toString("hex")] },
  clients: [
    { client_id: "dashboard", client_secret: "dashboard-secret", redirect_uris: [redirectUri], token_endpoint_auth_method: "client_secret_post" },
    { client_id: "gateway", client_secret: "gateway-secret", redirect_uris: [], response_types: [], grant_types: ["client_credentials"] },
  ],
  pkce: { required: () => true },
  scopes: ["openid", "roles"],
  claims: { openid: ["sub"], roles: ["roles"] },
  conformIdTokenClaims: false,
  findAccount: (_, sub) => ({ accountId: sub, claims: () => ({ sub, roles: sub === "guest" ? [] : ["radiologist"] }) }),
  features: {
    clientCredentials: { enabled: true },
    resourceIndicators: {
      enabled: true,
      getResourceServerInfo: (_, resource) => ({
        scope: "roles", audience: resource === "urn:counterpart" ? "counterpart" : "another", accessTokenFormat: "jwt", accessTokenTTL: 60,
      }),
    },
  },
  extraTokenClaims: () => ({ roles: ["mtra"] }),
});
provider.listen(Number(port), "127.0.0.1");
