// Vercel's AI SDK against the scripted service: node ai_sdk_check.mjs URL MODEL, where `ai` and its providers are installed.
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, stepCountIs, streamText, tool } from "ai";
import assert from "node:assert/strict";
import { z } from "zod";

const [url, name] = process.argv.slice(2);
const prompt = 'THINK Hm.\nCALL add {"a": 2, "b": 40}\nCALL look {"at": "Köln"}\nSAY It is {result}.';
const seen = [];
const tools = {
  add: tool({
    description: "Adds.",
    inputSchema: z.object({ a: z.number(), b: z.number() }),
    execute: async ({ a, b }) => (seen.push(`add ${a} ${b}`), a + b),
  }),
  look: tool({
    description: "Looks.",
    inputSchema: z.object({ at: z.string() }),
    execute: async ({ at }) => (seen.push(`look ${at}`), `seen ${at}`),
  }),
};

const compatible = createOpenAICompatible({ name: "ours", baseURL: `${url}/v1`, apiKey: "none" });
const openai = createOpenAI({ baseURL: `${url}/v1`, apiKey: "none" });
const anthropic = createAnthropic({ baseURL: `${url}/v1`, apiKey: "none" });
for (const model of [compatible(name), openai.chat(name), openai.responses(name), anthropic(name)]) {
  const asked = { model, tools, prompt, stopWhen: stepCountIs(5), maxRetries: 0, providerOptions: { openai: { store: false } } };
  seen.length = 0;
  const whole = await generateText(asked);
  assert.equal(whole.text, "It is seen Köln.");
  assert.deepEqual(seen, ["add 2 40", "look Köln"]);
  seen.length = 0;
  const streamed = streamText({ ...asked, onError: ({ error }) => { throw error; } });
  await streamed.consumeStream();
  assert.equal(await streamed.text, "It is seen Köln.");
  assert.deepEqual(seen, ["add 2 40", "look Köln"]);
}
console.log("ai-sdk: ok");
