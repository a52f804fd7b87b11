// The official npm client (6.x) against a running service: node openai_check.mjs URL MODEL, where `openai` is installed.
import OpenAI from "openai";
import assert from "node:assert/strict";

const [url, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: process.env.OPENAI_API_KEY ?? "none", maxRetries: 0, timeout: 120_000 });
const messages = [{ role: "user", content: [{ type: "text", text: "Say hello in Japanese and add an emoji." }] }];

const ids = [];
for await (const card of client.models.list()) ids.push(card.id);
assert.ok(ids.includes(model), `${ids}`); // a service may have several names

const fields = { model, messages, max_completion_tokens: 24, temperature: 0, logprobs: true, top_logprobs: 2 };
const whole = await client.chat.completions.create(fields);
const content = whole.choices[0].logprobs.content;
assert.equal(content.length, whole.usage.completion_tokens);

let text = "";
const tokens = [];
const stream = await client.chat.completions.create({ ...fields, stream: true, stream_options: { include_usage: true } });
let usage = null;
for await (const chunk of stream) {
  usage = chunk.usage ?? usage;
  for (const choice of chunk.choices) {
    text += choice.delta.content ?? "";
    tokens.push(...(choice.logprobs?.content ?? []).map((token) => token.token));
  }
}
assert.equal(text, whole.choices[0].message.content);
assert.deepEqual(tokens, content.map((token) => token.token));
assert.equal(usage.completion_tokens, whole.usage.completion_tokens);

const summed = await client.chat.completions.stream({ model, messages, max_completion_tokens: 8 }).finalChatCompletion();
assert.equal(summed.choices.length, 1);

const echo = await client.completions.create({ model, prompt: "The capital", max_tokens: 2, logprobs: 1, echo: true });
assert.equal(echo.choices[0].logprobs.token_logprobs[0], null);
assert.ok(echo.choices[0].text.startsWith("The capital"));

await assert.rejects(client.chat.completions.create({ model, messages, temperature: -1 }), (error) => {
  assert.ok(error instanceof OpenAI.BadRequestError);
  return error.param === "temperature";
});
await assert.rejects(client.chat.completions.create({ model: "no-such-model", messages }), OpenAI.NotFoundError);
console.log("openai for node: ok");
