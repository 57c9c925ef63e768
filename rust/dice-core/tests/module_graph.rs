//! Modules import each other in one direction: there is no cycle between modules, and each folder imports only folders
//! below it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// Imports of each module, as paths like `input::block`. The crate root is the empty path.
type Graph = BTreeMap<String, BTreeSet<String>>;

/// Folders and top modules, each above those after it.
const ORDER: [&str; 11] =
    ["", "stream", "mine", "options", "result", "penalty", "pairs", "sampling", "input", "numeric", "error"];

/// The sources of all modules under a folder, by module path.
fn sources(folder: &Path, prefix: &str, modules: &mut BTreeMap<String, String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let stem = path.file_stem().unwrap().to_str().unwrap();
        let name = if prefix.is_empty() { stem.to_string() } else { format!("{prefix}::{stem}") };
        if path.is_dir() {
            sources(&path, &name, modules);
        } else {
            let module = match stem {
                "lib" => String::new(),
                "mod" => prefix.to_string(),
                _ => name,
            };
            modules.insert(module, fs::read_to_string(&path).unwrap());
        }
    }
}

/// Paths after each `crate::` outside comments and unit tests. A group like `a::{b, c::d}` is expanded.
fn crate_paths(source: &str) -> Vec<String> {
    let code = source.split("#[cfg(test)]").next().unwrap();
    let code: String = code
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .flat_map(|line| [line, "\n"])
        .collect();
    let mut paths = Vec::new();
    for (start, _) in code.match_indices("crate::") {
        expand(&code[start + "crate::".len()..], "", &mut paths);
    }
    paths
}

/// Expands the use tree at the start of `code` below `prefix`. Returns the rest of the code.
fn expand<'a>(code: &'a str, prefix: &str, paths: &mut Vec<String>) -> &'a str {
    let code = code.trim_start();
    if let Some(mut rest) = code.strip_prefix('{') {
        while !rest.trim_start().starts_with('}') {
            rest = expand(rest, prefix, paths).trim_start();
            rest = rest.strip_prefix(',').unwrap_or(rest);
        }
        return &rest.trim_start()[1..];
    }
    let end = code.find(|c: char| !c.is_alphanumeric() && c != '_' && c != '*').unwrap_or(code.len());
    assert!(end > 0, "not a path: {}", code.lines().next().unwrap());
    let path =
        if prefix.is_empty() { code[..end].to_string() } else { format!("{prefix}::{}", &code[..end]) };
    match code[end..].strip_prefix("::") {
        Some(rest) => expand(rest, &path, paths),
        None => {
            paths.push(path);
            &code[end..]
        }
    }
}

/// The module that a path is in: its longest prefix that is a module.
fn module_of<'a>(path: &'a str, modules: &BTreeMap<String, String>) -> &'a str {
    let mut module = path;
    while !modules.contains_key(module) {
        module = module.rsplit_once("::").map_or("", |(parent, _)| parent);
    }
    module
}

/// A module with submodules counts as an importer of them, since what is named by the module comes from them.
fn graph(modules: &BTreeMap<String, String>) -> Graph {
    let mut graph: Graph = modules
        .iter()
        .map(|(module, source)| {
            let paths = crate_paths(source);
            (module.clone(), paths.iter().map(|path| module_of(path, modules).to_string()).collect())
        })
        .collect();
    for module in modules.keys().filter(|module| !module.is_empty()) {
        let parent = module.rsplit_once("::").map_or("", |(parent, _)| parent);
        graph.get_mut(parent).unwrap().insert(module.clone());
    }
    graph
}

/// The modules of a cycle, in the order of their imports.
fn cycle(graph: &Graph) -> Option<Vec<String>> {
    fn visit(module: &str, graph: &Graph, path: &mut Vec<String>, done: &mut BTreeSet<String>) -> bool {
        if let Some(start) = path.iter().position(|other| other == module) {
            path.drain(..start);
            return true;
        }
        if done.contains(module) {
            return false;
        }
        path.push(module.into());
        // A module may name itself in a macro.
        let mut imports = graph[module].iter().filter(|import| *import != module);
        if imports.any(|import| visit(import, graph, path, done)) {
            return true;
        }
        path.pop();
        done.insert(module.into());
        false
    }
    let mut done = BTreeSet::new();
    graph.keys().find_map(|module| {
        let mut path = Vec::new();
        visit(module, graph, &mut path, &mut done).then_some(path)
    })
}

fn folder(module: &str) -> &str {
    module.split("::").next().unwrap()
}

fn crate_modules() -> BTreeMap<String, String> {
    let mut modules = BTreeMap::new();
    sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), "", &mut modules);
    modules
}

#[test]
fn modules_have_no_cycle() {
    let graph = graph(&crate_modules());
    assert!(
        graph["mine"].contains("input::columns") && graph["penalty::scan"].contains("pairs::pool"),
        "{graph:?}"
    );
    assert_eq!(cycle(&graph), None);
}

#[test]
fn folders_import_only_those_below() {
    let rank = |module: &str| ORDER.iter().position(|name| *name == folder(module)).expect(module);
    for (module, imports) in graph(&crate_modules()) {
        for import in imports.iter().filter(|import| folder(import) != folder(&module)) {
            assert!(rank(&module) < rank(import), "{module} imports {import}, which is above it");
        }
    }
}

#[test]
fn no_module_imports_from_its_parent() {
    for (module, source) in crate_modules() {
        // Submodules inside a file are indented, and may use `super`.
        let parent = source.lines().find(|line| line.starts_with("use super::"));
        assert_eq!(parent, None, "{module}: name the module from `crate::` on");
    }
}

#[test]
fn a_seeded_cycle_is_detected() {
    let mut modules = crate_modules();
    // columns imports block already.
    modules.get_mut("input::block").unwrap().insert_str(0, "use crate::input::{filter, columns::Columns};\n");
    let expected = ["input::block", "input::columns"].map(String::from);
    assert_eq!(cycle(&graph(&modules)), Some(expected.to_vec()));
    // A type of the root, which imports every module.
    let mut modules = crate_modules();
    modules.get_mut("input::pass").unwrap().push_str("fn columns(_: &crate::Columns) {}\n");
    assert!(cycle(&graph(&modules)).is_some_and(|path| path.contains(&String::new())));
}
