// The official npm client of OpenAI against a server: node openai_contract.mjs URL KEY FOLDER_OF_NODE_MODULES
import { createRequire } from "node:module";
import assert from "node:assert/strict";

const [url, key, modules] = process.argv.slice(2);
const OpenAI = createRequire(modules + "/")("openai").default;
const client = new OpenAI({ baseURL: url + "/v1", apiKey: key, maxRetries: 0, timeout: 120000 });
const messages = [{ role: "user", content: "Say something." }];
const common = { model: "meteora", messages, temperature: 0, max_tokens: 12 };

const names = [];
for await (const model of client.models.list()) names.push(model.id);
assert.deepEqual(names.slice(0, 2), ["meteora", "base"]);

const whole = await client.chat.completions.create(common);
assert.equal(whole.usage.total_tokens, whole.usage.prompt_tokens + whole.usage.completion_tokens);
let text = "", last = null;
for await (const chunk of await client.chat.completions.create({ ...common, stream: true, stream_options: { include_usage: true } })) {
  text += chunk.choices[0]?.delta?.content ?? "";
  last = chunk;
}
assert.equal(text, whole.choices[0].message.content);
assert.equal(last.usage.completion_tokens, whole.usage.completion_tokens);

const completion = await client.completions.create({ model: "base", prompt: "ab", max_tokens: 4, temperature: 0, logprobs: 1 });
assert.ok(completion.choices[0].logprobs.tokens.length >= 1);
const logged = await client.chat.completions.create({ ...common, logprobs: true, top_logprobs: 2 });
assert.equal(logged.choices[0].logprobs.content[0].top_logprobs.length, 2);

const schema = { type: "object", properties: { n: { enum: [1, 2] } }, required: ["n"], additionalProperties: false };
const json = await client.chat.completions.create({ ...common, max_tokens: 60, response_format: { type: "json_schema", json_schema: { name: "n", schema, strict: true } } });
assert.ok([1, 2].includes(JSON.parse(json.choices[0].message.content).n));

const tools = [{ type: "function", function: { name: "pick", parameters: schema } }];
const called = await client.chat.completions.create({ ...common, max_tokens: 90, tools, tool_choice: "required" });
assert.equal(called.choices[0].finish_reason, "tool_calls");
assert.ok([1, 2].includes(JSON.parse(called.choices[0].message.tool_calls[0].function.arguments).n));

const response = await client.responses.create({ model: "meteora", input: "Say something.", max_output_tokens: 8, temperature: 0 });
let streamed = "";
for await (const event of await client.responses.create({ model: "meteora", input: "Say something.", max_output_tokens: 8, temperature: 0, stream: true })) {
  if (event.type === "response.output_text.delta") streamed += event.delta;
}
assert.equal(streamed, response.output_text);

await assert.rejects(client.chat.completions.create({ ...common, model: "nothing" }), error => error.status === 404 && error.code === "model_not_found");
await assert.rejects(client.chat.completions.create({ ...common, temperature: 9 }), error => error.status === 400 && error.param === "temperature");
await assert.rejects(new OpenAI({ baseURL: url + "/v1", apiKey: "wrong", maxRetries: 0 }).models.list(), error => error.status === 401);

const stream = await client.completions.create({ model: "meteora", prompt: "ab", max_tokens: 400, stream: true, ignore_eos: true });
for await (const chunk of stream) break;
stream.controller.abort();
console.log("all passed");
